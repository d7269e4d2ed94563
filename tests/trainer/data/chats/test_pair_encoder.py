"""Ids of pairs and prompts: as the chat template gives them, cut alike, one shared beginning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from chat_tokenizers import byte_level_tokenizer, sentencepiece_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from trainer.data.chats.chat import prompt_ids, resolve_template
from trainer.data.chats.chat_encoder import ChatEncoder, ChatSpec, TooLongError
from trainer.data.chats.conversation import Conversation, Message, Role
from trainer.data.chats.pair_encoder import EncodedPair, PairEncoder, PairSpec
from trainer.data.chats.preferences import EqualAnswersError, Preference
from trainer.data.chats.prompt_encoder import PromptEncoder, PromptSpec
from trainer.data.chats.templates import builtin_templates
from trainer.data.reading.raw import RowError

USER: Role = "user"
ASSISTANT: Role = "assistant"
SYSTEM = Message("system", "Be kind.")
TURNS = (
    *(Message(USER, "你好\n\nhi "), Message(ASSISTANT, "𥳇 hello")),
    *(Message(USER, "what is 1 + 1?"), Message(ASSISTANT, "2")),
    Message(USER, "sure?"),
)
GOOD, BAD = Message(ASSISTANT, "yes, 是的。"), Message(ASSISTANT, "no way, it is 3")
PAIR = Preference(Conversation(TURNS), GOOD, BAD)


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return byte_level_tokenizer() if request.param == "byte-level" else sentencepiece_tokenizer()


def encoder_of(tokenizer: PreTrainedTokenizerFast, template: str, **options: Any) -> PairEncoder:
    return PairEncoder(PairSpec.of(tokenizer, template, train_on="last", **options))


def rendered(
    tokenizer: PreTrainedTokenizerFast, template: str, conversation: Conversation
) -> list[int]:
    ids = tokenizer.apply_chat_template(
        conversation.as_chat(), chat_template=template, tokenize=True, return_dict=False
    )
    return list(ids)  # type: ignore[arg-type]


def prompt_lengths(pair: EncodedPair) -> list[int]:
    return [int(np.flatnonzero(side.weights)[0]) for side in pair.sides]


@pytest.mark.parametrize("name", builtin_templates())
def test_both_sides_are_what_the_template_gives(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    template = resolve_template(tokenizer, name)
    encoder = encoder_of(tokenizer, template)
    pair = encoder.encode_pair(PAIR)
    last = ChatEncoder(ChatSpec.of(tokenizer, template, train_on="last"))
    assert pair.chosen is not None and pair.rejected is not None
    first, second = prompt_lengths(pair)
    assert first == second
    assert pair.chosen.input_ids[:first].tolist() == pair.rejected.input_ids[:first].tolist()
    for side, answer in ((pair.chosen, GOOD), (pair.rejected, BAD)):
        whole = PAIR.whole(answer)
        ids, expected = side.input_ids.tolist(), rendered(tokenizer, template, whole)
        # A template that ends no answer gets the end token, without which none would be learnt.
        assert ids in (expected, [*expected, tokenizer.eos_token_id])
        (learnt,) = last.encode(whole).chats
        assert ids == learnt.input_ids.tolist()
        # A token may reach over the start of one answer only: the other side's starts as early.
        assert np.array_equal(side.weights[first + 2 :], learnt.weights[first + 2 :])
        assert side.num_chars == learnt.num_chars
    assert pair.num_tokens == len(pair.chosen.input_ids) + len(pair.rejected.input_ids)
    assert pair.num_turns_cut == 0


@pytest.mark.parametrize("name", builtin_templates())
def test_prompt_ends_where_the_answers_begin(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    tokenizer.chat_template = template = resolve_template(tokenizer, name)
    prompts = PromptEncoder(PromptSpec.of(tokenizer, template))
    ids, spells = prompts.encode_prompt(PAIR.prompt)
    assert ids.tolist() == prompt_ids(tokenizer, TURNS) and not spells
    pair = encoder_of(tokenizer, template).encode_pair(PAIR)
    text = prompts.render_prompt(PAIR.prompt)
    assert all(side.text.startswith(text) for side in pair.sides)
    assert [side.learnt[0][0] for side in pair.sides] == [len(text)] * 2


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_lone_answer(tokenizer: PreTrainedTokenizerFast, side: str) -> None:
    template = resolve_template(tokenizer, "chatml")
    lone = Preference(PAIR.prompt, GOOD if side == "chosen" else None, None)
    lone = lone if side == "chosen" else Preference(PAIR.prompt, None, GOOD)
    pair = encoder_of(tokenizer, template).encode_pair(lone)
    (encoded,) = pair.sides
    assert encoded is (pair.chosen if side == "chosen" else pair.rejected)
    assert encoded.input_ids.tolist() == rendered(tokenizer, template, PAIR.whole(GOOD))


def beginnings(system: bool) -> Iterator[Conversation]:
    head = (SYSTEM,) if system else ()
    for start in (0, 2, 4):
        yield Conversation((*head, *TURNS[start:]))


@pytest.mark.parametrize("system", [True, False])
def test_oldest_turns_of_both_sides_are_cut_alike(
    tokenizer: PreTrainedTokenizerFast, system: bool
) -> None:
    template = resolve_template(tokenizer, "chatml")
    options: dict[str, Any] = {"system": SYSTEM.content} if system else {}
    sizes = []
    for number, prompt in enumerate(beginnings(system)):
        sides = [(*prompt.messages, answer) for answer in (GOOD, BAD)]
        expected = [rendered(tokenizer, template, Conversation(side)) for side in sides]
        size = sum(map(len, expected))
        sizes.append(size)
        pair = encoder_of(tokenizer, template, max_length=size, **options).encode_pair(PAIR)
        assert [side.input_ids.tolist() for side in pair.sides] == expected
        assert (pair.num_turns_cut, pair.num_tokens) == (number, sizes[0])
    with pytest.raises(TooLongError, match=f"data.max_length={sizes[-1] - 1}: {sizes[0]} tokens"):
        encoder_of(tokenizer, template, max_length=sizes[-1] - 1, **options).encode_pair(PAIR)


def test_equal_after_rendering(tokenizer: PreTrainedTokenizerFast) -> None:
    """Templates that strip an answer make two of one."""
    strips = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    spaced = Preference(PAIR.prompt, GOOD, Message(ASSISTANT, f" {GOOD.content}\n"))
    with pytest.raises(EqualAnswersError, match="equal in tokens"):
        encoder_of(tokenizer, strips).encode_pair(spaced)


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer that reads "abc" as a, bc and "abd" as ab, d."""
    pieces = ["<s>", "</s>", *"?abcd", "bc", "ab"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab, [("b", "c"), ("a", "b")]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def pair_of(asked: str, chosen: str, rejected: str) -> Preference:
    prompt = Conversation((Message(USER, asked),))
    return Preference(prompt, Message(ASSISTANT, chosen), Message(ASSISTANT, rejected))


@pytest.mark.parametrize(
    ("asked", "chosen", "rejected", "shared"),
    [
        ("?ab", "c", "d", "?"),  # a bc, ab d: the prompt ends in another token
        ("?b", "c", "d", "?"),  # bc, b d: a token reaches over the start of one answer
        ("?b", "d", "a", "?b"),
    ],
)
def test_shared_beginning_is_what_is_shared_in_tokens(
    asked: str, chosen: str, rejected: str, shared: str
) -> None:
    tokenizer = letters_tokenizer()
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    pair = encoder_of(tokenizer, template).encode_pair(pair_of(asked, chosen, rejected))
    for side, text in zip(pair.sides, (chosen, rejected), strict=True):
        ids, start = side.input_ids.tolist(), prompt_lengths(pair)[0]
        assert "".join(map(str, tokenizer.convert_ids_to_tokens(ids[:start]))) == f"<s>{shared}"
        said = "".join(map(str, tokenizer.convert_ids_to_tokens(ids[start:])))
        assert said == f"{asked}{text}</s>".removeprefix(shared)
        assert side.weights.tolist() == [0.0] * start + [1.0] * (len(ids) - start)


def test_sides_without_a_common_token() -> None:
    bare = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(RowError, match="no token in common that their answers follow"):
        encoder_of(letters_tokenizer(), bare).encode_pair(pair_of("b", "c", "d"))


def test_prompt_that_is_too_long(tokenizer: PreTrainedTokenizerFast) -> None:
    template = resolve_template(tokenizer, "chatml")
    size = len(PromptEncoder(PromptSpec.of(tokenizer, template)).encode_prompt(PAIR.prompt)[0])
    fits = PromptSpec.of(tokenizer, template, max_length=size).build()
    assert len(fits.encode_prompt(PAIR.prompt)[0]) == size
    with pytest.raises(TooLongError, match=f"data.max_length={size - 1}: {size} tokens"):
        PromptSpec.of(tokenizer, template, max_length=size - 1).build().encode_prompt(PAIR.prompt)


def test_prompt_gets_the_system_message_and_tells_control_tokens(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = resolve_template(tokenizer, "chatml")
    encoder = PromptSpec.of(tokenizer, tokenizer.chat_template, system="Be kind.").build()
    asked = (Message(USER, "what is </s>?"),)
    ids, spells = encoder.encode_prompt(Conversation(asked))
    assert spells and ids.tolist() == prompt_ids(tokenizer, (SYSTEM, *asked))
