"""Ids and loss weights of conversations: exact ids, exact answers, whole turns."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_tokenizers import (
    byte_level_tokenizer,
    control_tokens,
    sentencepiece_tokenizer,
    with_control_tokens,
)
from transformers import PreTrainedTokenizerFast

from tokenizer.load import load_tokenizer
from trainer.config import SourceConfig
from trainer.data.chats.chat import encode_conversation, prompt_ids, resolve_template
from trainer.data.chats.chat_encoder import ChatEncoder, ChatSpec, EncodedChat, TooLongError
from trainer.data.chats.conversation import Conversation, Message
from trainer.data.chats.conversations import read_conversations
from trainer.data.chats.templates import builtin_templates
from trainer.data.reading.raw import RowError
from trainer.data.reading.records import RejectLog

SHARED = Path(__file__).resolve().parents[4].parent / "shared" / "data"
USER, ASSISTANT = "user", "assistant"
TOOL = {"name": "add", "description": "", "parameters": {"type": "object", "properties": {}}}
CONTROLS = [*control_tokens(), "<s>", "</s>", "[TOOL_CALLS]"]
CONTROL = re.compile(f"({'|'.join(map(re.escape, CONTROLS))})(?=.)", re.DOTALL)
DIALOGUES = [
    Conversation(
        (
            Message("system", "Be kind."),
            Message(USER, "你好\n\nhi "),
            Message(ASSISTANT, "𥳇 hello, 你好。"),  # a character of four bytes
            Message(USER, "?"),
            Message(ASSISTANT, "\n\n  indented\n"),
        )
    ),
    Conversation((Message(USER, "<x>"), Message(ASSISTANT, "2"))),
    Conversation(
        (
            Message(USER, "add 1"),
            Message(ASSISTANT, "Let me see.", ({"name": "add", "arguments": {"a": [1, "二"]}},)),
            Message("tool", '{"sum": 1}'),
            Message(ASSISTANT, "1"),
        ),
        (TOOL,),
    ),
]


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    return sentencepiece_tokenizer()


@pytest.fixture
def tokenizers(
    byte_level: PreTrainedTokenizerFast, sentencepiece: PreTrainedTokenizerFast
) -> list[PreTrainedTokenizerFast]:
    return [byte_level, sentencepiece]


def learnt_runs(chat: EncodedChat) -> list[list[int]]:
    """Return the ids of each stretch of learnt tokens."""
    runs: list[list[int]] = []
    learnt = np.flatnonzero(chat.weights > 0)
    for before, at in zip([-2, *learnt], learnt, strict=False):
        if before + 1 != at:
            runs.append([])
        runs[-1].append(int(chat.input_ids[at]))
    return runs


def said_by(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """Return exactly the text of ids; decoding drops spaces next to control tokens."""
    if tokenizer.convert_tokens_to_ids("▁") is None:
        return str(tokenizer.decode(ids, skip_special_tokens=False))
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(ids)]
    is_byte = re.compile("<0x([0-9A-F]{2})>").fullmatch
    parts = [
        bytes([int(found[1], 16)]) if (found := is_byte(piece)) else piece.encode()
        for piece in pieces
    ]
    return b"".join(parts).decode().replace("▁", " ")


def check_conversations(
    tokenizer: PreTrainedTokenizerFast, name: str, conversations: Sequence[Conversation]
) -> None:
    """Check ids and learnt text of conversations under a built-in template."""
    tokenizer.chat_template = resolve_template(tokenizer, name)
    encoder = ChatEncoder(ChatSpec.of(tokenizer, tokenizer.chat_template))
    for conversation in conversations:
        check_conversation(tokenizer, encoder, conversation)


def check_conversation(
    tokenizer: PreTrainedTokenizerFast, encoder: ChatEncoder, conversation: Conversation
) -> None:
    row = encoder.encode(conversation)
    exact = tokenizer.apply_chat_template(
        conversation.as_chat(),
        tools=conversation.tool_schemas(),
        tokenize=True,
        return_dict=False,
    )
    (chat,) = row.chats
    ids = chat.input_ids.tolist()
    if len(ids) > len(exact):  # a template that ends no answer: its end token is added
        assert ids.pop() == tokenizer.eos_token_id and chat.weights[-1] == 1
    assert ids == exact
    runs = learnt_runs(chat)
    answers = [i for i, m in enumerate(conversation.messages) if m.role == ASSISTANT]
    assert len(runs) == len(answers) == row.num_turns and row.num_turns_cut == 0
    for run, index, (start, end) in zip(runs, answers, chat.learnt, strict=True):
        check_answer(tokenizer, conversation, index, run, (chat.text[:start], chat.text[start:end]))


def check_answer(
    tokenizer: PreTrainedTokenizerFast,
    conversation: Conversation,
    index: int,
    run: list[int],
    texts: tuple[str, str],
) -> None:
    prompt, learnt = texts
    message = conversation.messages[index]
    # The learnt text is the answer and what ends it, nothing else but white space between.
    content = message.content.strip()
    assert content in learnt or message.tool_calls
    for call in message.tool_calls:
        assert call["name"] in learnt
        assert json.dumps(call["arguments"], ensure_ascii=False) in learnt
    if not message.tool_calls and not message.reasoning:
        thinking = "<think>\n\n</think>"
        rest = learnt.removeprefix(thinking).strip().removeprefix(content).strip()
        assert rest == "" or rest in CONTROLS, (learnt, rest)
    # The learnt tokens say the learnt text, with the end token where the template has none.
    said = said_by(tokenizer, run)
    # One token may reach over the border: "\n" of the prompt and "\n" of the answer, or `:"`.
    over = [prompt[len(prompt) - n :] + learnt for n in range(3)]
    assert any(said in variants(tokenizer, text) for text in over), (said, learnt)


def variants(tokenizer: PreTrainedTokenizerFast, learnt: str) -> Iterator[str]:
    """Yield how tokens may say a text: SentencePiece puts a space after each control token."""
    spaced = CONTROL.sub(r"\1 ", learnt)
    for text in (learnt, spaced, f" {learnt}", f" {spaced}"):
        yield text
        yield text + str(tokenizer.eos_token)


@pytest.mark.parametrize("name", builtin_templates())
def test_ids_and_learnt_text_are_exact(
    tokenizers: list[PreTrainedTokenizerFast], name: str
) -> None:
    for tokenizer in tokenizers:
        check_conversations(tokenizer, name, DIALOGUES)


@pytest.mark.parametrize("name", builtin_templates())
def test_prompts_are_prefixes_of_what_is_trained(
    tokenizers: list[PreTrainedTokenizerFast], name: str
) -> None:
    for tokenizer in tokenizers:
        tokenizer.chat_template = resolve_template(tokenizer, name)
        for conversation in DIALOGUES[:2]:
            messages = conversation.messages
            (chat,) = encode_conversation(tokenizer, conversation).chats
            prompt = prompt_ids(tokenizer, messages[:-1])
            first = len(chat.weights) - len(learnt_runs(chat)[-1])
            first -= int((chat.weights[::-1] > 0).argmax())  # what follows the end token
            # A merge over the border ("\n" + "\n") belongs to the answer.
            assert chat.input_ids[:first].tolist() == prompt[:first]
            assert len(prompt) - first <= 1


@pytest.mark.parametrize("name", sorted({*builtin_templates()} - {"breeze", "qwen3"}))
def test_turns_before_are_as_they_were(
    tokenizers: list[PreTrainedTokenizerFast], name: str
) -> None:
    """Breeze ends the last answer only, Qwen3 has a place for thoughts in the last only."""
    for tokenizer in tokenizers:
        encoder = ChatEncoder(ChatSpec.of(tokenizer, resolve_template(tokenizer, name)))
        whole = long_dialogue(4)
        (full,) = encoder.encode(whole).chats
        for num_turns in (1, 2, 3):
            (begin,) = encoder.encode(Conversation(whole.messages[: 1 + 2 * num_turns])).chats
            ends = int(np.flatnonzero(begin.weights)[-1])  # the token that ends the last answer
            assert begin.input_ids[:ends].tolist() == full.input_ids[:ends].tolist()
            assert begin.weights[: ends + 1].tolist() == full.weights[: ends + 1].tolist()
            assert len(learnt_runs(begin)) == num_turns


def test_end_tokens_are_learnt_and_nothing_after_them(
    byte_level: PreTrainedTokenizerFast,
) -> None:
    assert byte_level.pad_token_id == byte_level.eos_token_id
    for name in builtin_templates():
        template = resolve_template(byte_level, name)
        (chat,) = encode_conversation(byte_level, DIALOGUES[0], template=template).chats
        last = learnt_runs(chat)[-1][-1]
        assert last in byte_level.added_tokens_decoder, name
        assert sum(i in byte_level.added_tokens_decoder for i in learnt_runs(chat)[-1]) == 1


def test_train_on(byte_level: PreTrainedTokenizerFast) -> None:
    template = resolve_template(byte_level, "chatml")

    def learnt(**options: Any) -> list[str]:
        row = encode_conversation(byte_level, DIALOGUES[0], template=template, **options)
        return [byte_level.decode(run) for run in learnt_runs(row.chats[0])]

    first, last = "𥳇 hello, 你好。<|im_end|>", "\n\n  indented\n<|im_end|>"
    assert learnt() == [first, last]
    assert learnt(train_on="last") == [last]
    (everything,) = learnt(train_on="everything")
    assert everything.endswith(last + "\n") and "Be kind." in everything
    row = encode_conversation(
        byte_level, DIALOGUES[0], template=template, train_on="everything"
    ).chats[0]
    assert row.weights.tolist() == [0] + [1] * (len(row.input_ids) - 1)
    assert (row.num_chars, row.num_bytes) == (len(row.text), len(row.text.encode()))


def test_weights_of_messages(byte_level: PreTrainedTokenizerFast) -> None:
    template = resolve_template(byte_level, "chatml")
    messages = (
        Message(USER, "a"),
        Message(ASSISTANT, "b", weight=0.0),
        Message(USER, "c"),
        Message(ASSISTANT, "d 你", weight=2.5),
    )
    (chat,) = encode_conversation(byte_level, Conversation(messages), template=template).chats
    assert set(chat.weights.tolist()) == {0.0, 2.5}
    assert [byte_level.decode(run) for run in learnt_runs(chat)] == ["d 你<|im_end|>"]
    assert (chat.num_chars, chat.num_bytes) == (3, 5)
    (whole,) = encode_conversation(
        byte_level, Conversation(messages), template=template, train_on="everything"
    ).chats
    assert set(whole.weights.tolist()) == {0.0, 1.0, 2.5}
    silent = Conversation(messages[:2])
    with pytest.raises(RowError, match="every answer has weight 0"):
        encode_conversation(byte_level, silent, template=template)
    last = Conversation((*messages, Message(USER, "e"), Message(ASSISTANT, "f", weight=0.0)))
    with pytest.raises(RowError, match="every answer has weight 0"):
        encode_conversation(byte_level, last, template=template, train_on="last")


def test_system_goes_where_none_is(byte_level: PreTrainedTokenizerFast) -> None:
    template = resolve_template(byte_level, "chatml")

    def text(conversation: Conversation) -> str:
        row = encode_conversation(byte_level, conversation, template=template, system="NEW")
        return row.chats[0].text

    assert "NEW" not in text(DIALOGUES[0])
    assert text(DIALOGUES[1]).startswith("<|im_start|>system\nNEW<|im_end|>\n")


def long_dialogue(num_turns: int) -> Conversation:
    turns = [
        message
        for i in range(num_turns)
        for message in (Message(USER, f"question {i}"), Message(ASSISTANT, f"answer {i}"))
    ]
    return Conversation((Message("system", "S"), *turns))


def test_too_long_loses_whole_turns(byte_level: PreTrainedTokenizerFast) -> None:
    template = resolve_template(byte_level, "chatml")
    whole = long_dialogue(6)
    full = len(encode_conversation(byte_level, whole, template=template).chats[0].input_ids)
    for limit in range(70, full + 1, 7):
        row = encode_conversation(byte_level, whole, template=template, max_length=limit)
        (chat,) = row.chats
        kept = len(learnt_runs(chat))
        begin = Conversation(whole.messages[: 1 + 2 * kept])
        same = encode_conversation(byte_level, begin, template=template).chats[0]
        assert chat.input_ids.tolist() == same.input_ids.tolist()  # a true beginning
        assert len(chat.input_ids) <= limit and row.num_turns_cut == 6 - kept
        more = Conversation(whole.messages[: 3 + 2 * kept])
        longer = encode_conversation(byte_level, more, template=template).chats[0]
        assert kept == 6 or len(longer.input_ids) > limit  # as many as fit
        assert row.num_tokens == full


def test_last_answer_keeps_the_newest_turns(byte_level: PreTrainedTokenizerFast) -> None:
    template = resolve_template(byte_level, "chatml")
    row = encode_conversation(
        byte_level, long_dialogue(6), template=template, train_on="last", max_length=120
    )
    (chat,) = row.chats
    assert chat.text.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nquestion")
    assert "question 0" not in chat.text and "question 4" in chat.text
    assert [byte_level.decode(run) for run in learnt_runs(chat)] == ["answer 5<|im_end|>"]


def test_a_turn_that_fits_not_even_alone(byte_level: PreTrainedTokenizerFast) -> None:
    template = resolve_template(byte_level, "chatml")
    with pytest.raises(TooLongError, match=r"longer than data\.max_length=20: \d+ tokens") as error:
        encode_conversation(byte_level, long_dialogue(3), template=template, max_length=20)
    full = encode_conversation(byte_level, long_dialogue(3), template=template)
    assert error.value.num_tokens == full.num_tokens > 20


def test_thoughts_that_the_template_drops_are_learnt_on_their_own(
    byte_level: PreTrainedTokenizerFast,
) -> None:
    template = resolve_template(byte_level, "qwen3")
    messages = (
        Message(USER, "q1"),
        Message(ASSISTANT, "a1", reasoning="because 1"),
        Message(USER, "q2"),
        Message(ASSISTANT, "a2", reasoning="because 2"),
    )
    row = encode_conversation(byte_level, Conversation(messages), template=template)
    whole, alone = row.chats
    assert "because 1" not in whole.text and "because 1" in alone.text
    assert alone.text == byte_level.apply_chat_template(
        Conversation(messages[:2]).as_chat(), chat_template=template, tokenize=False
    )
    learnt = [[byte_level.decode(run) for run in learnt_runs(chat)] for chat in row.chats]
    assert learnt == [
        ["<think>\nbecause 2\n</think>\n\na2<|im_end|>"],
        ["<think>\nbecause 1\n</think>\n\na1<|im_end|>"],
    ]
    assert (row.num_turns, row.num_turns_cut) == (2, 0)
    last = encode_conversation(
        byte_level, Conversation(messages), template=template, train_on="last"
    )
    assert len(last.chats) == 1


def test_thoughts_in_the_answer_itself_are_learnt_too(
    byte_level: PreTrainedTokenizerFast,
) -> None:
    answers = [f"<think>\nbecause {n}\n</think>\n\na{n}" for n in "12"]
    messages = tuple(
        message
        for question, answer in zip("xy", answers, strict=True)
        for message in (Message(USER, question), Message(ASSISTANT, answer))
    )
    row = encode_conversation(
        byte_level, Conversation(messages), template=resolve_template(byte_level, "qwen3")
    )
    learnt = [byte_level.decode(run) for chat in row.chats for run in learnt_runs(chat)]
    assert learnt == [f"{answers[1]}<|im_end|>", f"{answers[0]}<|im_end|>"]
    assert not row.hides_thoughts


def test_thoughts_that_no_row_shows_are_told(byte_level: PreTrainedTokenizerFast) -> None:
    answer = Message(ASSISTANT, "a", reasoning="because")
    spelt = Message(ASSISTANT, "<think>because</think>a")
    # DeepSeek-R1's template never shows what stands before the end of thoughts.
    hiding = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
    )
    chatml = resolve_template(byte_level, "chatml")
    for message, template, hidden in (
        (answer, chatml, True),
        (spelt, chatml, False),
        (spelt, hiding, True),
        (Message(ASSISTANT, "a"), chatml, False),
    ):
        chat = Conversation((Message(USER, "q"), message, Message(USER, "q"), message))
        row = encode_conversation(byte_level, chat, template=template)
        assert row.hides_thoughts is hidden
        assert sum(len(learnt_runs(part)) for part in row.chats) == row.num_turns == 2


def test_spelt_control_tokens_are_read_and_told(byte_level: PreTrainedTokenizerFast) -> None:
    template = resolve_template(byte_level, "chatml")
    spelt = Conversation((Message(USER, "what is </s>?"), Message(ASSISTANT, "an <|im_end|> too")))
    row = encode_conversation(byte_level, spelt, template=template)
    assert row.spells_control
    assert row.chats[0].input_ids.tolist() == byte_level.apply_chat_template(
        spelt.as_chat(), chat_template=template, return_dict=False
    )
    (run,) = learnt_runs(row.chats[0])
    assert byte_level.decode(run) == "an <|im_end|> too<|im_end|>"
    assert not encode_conversation(byte_level, DIALOGUES[0], template=template).spells_control


def test_a_template_that_refuses(byte_level: PreTrainedTokenizerFast) -> None:
    template = "{{ raise_exception('no tools here') if tools }}{{ messages[0].content }}"
    with pytest.raises(RowError, match="chat template: no tools here"):
        encode_conversation(byte_level, DIALOGUES[2], template=template)
    with pytest.raises(RowError, match="the answer is not found"):
        encode_conversation(byte_level, DIALOGUES[1], template=template)


# What models' own templates do, each in its shortest form.
OWN = {
    "thoughts opened by the prompt": (
        "{% for m in messages %}<|user|>{{ m.content }}{{ eos_token if m.role == 'assistant' }}"
        "{% endfor %}{% if add_generation_prompt %}<|user|><think>\n{% endif %}",
        ["A1</s>", "A2</s>"],
    ),
    "two tokens after an answer": (
        "{% for m in messages %}<|user|>{{ m.content | trim }}<|end|>"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}<|user|>{% endif %}",
        ["A1<|end|></s>", "A2<|end|></s>"],
    ),
    "the generation tag": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
        "{% generation %}{{ m.content }}<|end|>{% endgeneration %}\n"
        "{% else %}<|user|>{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ["A1<|end|>", "A2<|end|>"],
    ),
    "the system message in the last question": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
        "{% elif m.role == 'user' %}[INST]{{ 'S!' if loop.index0 == messages | length - "
        "(2 if messages[-1].role == 'assistant' else 1) }}{{ m.content }}[/INST]{% endif %}"
        "{% endfor %}",
        ["A1</s>", "A2</s>"],
    ),
    "a refusal to show a beginning": (
        "{{ raise_exception('too short') if messages | length < 4 }}"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}",
        ["A1<|end|>", "A2<|end|>"],
    ),
    "no end at all": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        ["A1\n", "A2\n</s>"],
    ),
}


@pytest.mark.parametrize("habit", OWN)
def test_habits_of_models_own_templates(byte_level: PreTrainedTokenizerFast, habit: str) -> None:
    template, expected = OWN[habit]
    chat = Conversation(
        (
            Message(USER, "Q1"),
            Message(ASSISTANT, "A1"),
            Message(USER, "Q2"),
            Message(ASSISTANT, "A2"),
        )
    )
    row = encode_conversation(byte_level, chat, template=template)
    (found,) = row.chats
    runs = [said_by(byte_level, run) for run in learnt_runs(found)]
    assert [run.lstrip(" ") for run in runs] == expected
    exact = byte_level.apply_chat_template(
        chat.as_chat(), chat_template=template, return_dict=False
    )
    assert found.input_ids.tolist()[: len(exact)] == exact


def test_calls_have_ids_and_results_name_them(byte_level: PreTrainedTokenizerFast) -> None:
    calls = tuple({"name": name, "arguments": {}} for name in "fg")
    messages = (
        Message(USER, "q"),
        Message(ASSISTANT, "", calls),
        Message("tool", "1"),
        Message("tool", "2"),
        Message(ASSISTANT, "a"),
    )
    strict = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ raise_exception('no id') "
        "if c.id | length != 9 }}{{ c.id }}{% endfor %}{{ m.tool_call_id }}{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    )
    row = encode_conversation(byte_level, Conversation(messages), template=strict)
    expected = "qcall00000call00001</s>call000001call000012a</s>"
    assert row.chats[0].text == expected


def real_conversations() -> Iterator[Conversation]:
    """Yield 200 conversations of three real sets: calls, instructions, persona."""
    folder = SHARED / "sft" / "llama_factory"
    for name, num in (
        ("glaive_toolcall_zh_demo.json", 60),
        ("glaive_toolcall_en_demo.json", 20),
        ("alpaca_zh_demo.json", 60),
        ("v1_sft_demo.jsonl", 60),
    ):
        source = SourceConfig([str(folder / name)])
        found = [e.conversation for e in read_conversations(source, name, RejectLog(None, 1.0))]
        yield from random.Random(0).sample(found, num)


def real_tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    folder = SHARED / "tokenizers"
    files = {
        "llama2": folder / "llama2",
        "mistral": folder / "mistral" / "mistral_instruct_tokenizer_240323.model.v3",
        "chinese-alpaca-2": folder / "chinese-alpaca-2",
    }
    loaded = {name: with_control_tokens(load_tokenizer(path)) for name, path in files.items()}
    return {**loaded, "byte-level": byte_level_tokenizer()}


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real data at ../shared/data")
def test_real_conversations() -> None:
    """A tenth of 200 real conversations for each template, another one and tokenizer each time."""
    conversations, tokenizers = list(real_conversations()), list(real_tokenizers().values())
    for number, name in enumerate(builtin_templates()):
        tokenizer = tokenizers[number % len(tokenizers)]
        check_conversations(tokenizer, name, conversations[number % 10 :: 10])


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="no real data at ../shared/data")
@pytest.mark.parametrize("name", ["llama2", "mistral", "chinese-alpaca-2", "byte-level"])
def test_real_conversations_with_every_tokenizer(name: str) -> None:
    tokenizer, conversations = real_tokenizers()[name], list(real_conversations())
    for template in builtin_templates():
        check_conversations(tokenizer, template, conversations)
