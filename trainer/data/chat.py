"""Conversations to token ids and one loss weight per token.

The ids are those of ``tokenizer.apply_chat_template``. Each answer is learnt from its first token
to the token that ends it, which is always learnt; nothing of what the template writes after that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from trainer.data.conversation import Conversation, Message
from trainer.data.encode import EncoderSpec, token_dtype
from trainer.data.rendering import MARK, Renderer, Turn
from trainer.data.rows import RowError
from trainer.data.templates import resolve_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TrainOn = Literal["assistant", "last", "everything"]

__all__ = [
    "ChatEncoder",
    "ChatSpec",
    "EncodedChat",
    "encode_conversation",
    "prompt_ids",
    "prompt_text",
    "resolve_template",
    "stop_token_ids",
]


class TooLongError(RowError):
    """No turn of a conversation fits into ``data.max_length``."""


@dataclass(frozen=True)
class ChatSpec:
    """A tokenizer with its chat template and what to learn, as plain data for other processes.

    Attributes:
        encoder: the tokenizer.
        template: Jinja text.
        special_tokens: what ``bos_token``, ``eos_token`` … stand for in the template.
        train_on: learn every answer, the last one, or everything.
        system: put before conversations without a system message.
        max_length: tokens; None = no limit.
    """

    encoder: EncoderSpec
    template: str
    special_tokens: Mapping[str, str]
    train_on: TrainOn = "assistant"
    system: str | None = None
    max_length: int | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, template: str, **options: Any) -> ChatSpec:
        """Describe a loaded tokenizer with ``template``, the Jinja text."""
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        return cls(EncoderSpec.of(tokenizer), template, special, **options)


@dataclass(frozen=True)
class EncodedChat:
    """What one row of training is made from.

    Attributes:
        input_ids: ``[tokens]``.
        weights: ``[tokens]`` float32 factors of the loss of predicting each token; 0 = no target.
        num_chars: characters of the learnt text, without what the template adds.
        num_bytes: its UTF-8 bytes.
        num_turns: answers in it.
        text: the rendered conversation.
        learnt: the stretches of ``text`` that are learnt, as (start, end).
    """

    input_ids: NDArray[Any]
    weights: NDArray[np.float32]
    num_chars: int
    num_bytes: int
    num_turns: int
    text: str
    learnt: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class EncodedRow:
    """One conversation, as one or several rows of training.

    Attributes:
        chats: usually one; templates that leave old thoughts out need one for each such answer.
        num_turns_cut: answers that were left out because of ``max_length``.
        spells_control: whether a message spells a token such as ``</s>``, which is read as one.
    """

    chats: list[EncodedChat]
    num_turns_cut: int
    spells_control: bool


class ChatEncoder:
    """Encode conversations.

    Args:
        spec: what ``ChatSpec.of`` made of a tokenizer and a template.
    """

    def __init__(self, spec: ChatSpec) -> None:
        self._spec = spec
        self._backend = Tokenizer.from_str(spec.encoder.backend_json)
        self._backend.no_truncation()
        self._backend.no_padding()
        self.dtype = token_dtype(spec.encoder.num_ids)
        added = self._backend.get_added_tokens_decoder()
        # Gemma keeps runs of newlines as added tokens: blank ones end nothing.
        control = {i: token.content for i, token in added.items() if token.content.strip()}
        self.control_ids = frozenset(control)
        self._ids_of_end = {spec.encoder.eos_token_id} - {None}
        self._renderer = Renderer(spec.template, spec.special_tokens, list(control.values()))

    def encode(self, conversation: Conversation) -> EncodedRow:
        """Encode one conversation, cut to whole turns that fit.

        Raises:
            TooLongError: not even one turn fits.
            RowError: the template refuses it, or there is nothing to learn in it.
        """
        conversation = self._with_system(conversation)
        chosen = self._chosen(conversation.messages)
        if not chosen and self._spec.train_on != "everything":
            raise RowError("nothing to learn: every answer has weight 0")
        chats, cut, failed = [], 0, None
        for messages, learnt, keep_newest in self._rows(conversation, chosen):
            try:
                chat, num_cut = self._fit(conversation, messages, learnt, keep_newest)
            except TooLongError as error:
                failed, cut = error, cut + len(learnt)
                continue
            chats.append(chat)
            cut += num_cut
        if not chats:
            raise failed or RowError("nothing to learn")
        return EncodedRow(chats, cut, self._spells_control(conversation))

    def _with_system(self, conversation: Conversation) -> Conversation:
        messages, system = conversation.messages, self._spec.system
        if system is None or (messages and messages[0].role == "system"):
            return conversation
        return Conversation((Message("system", system), *messages), conversation.tools)

    def _chosen(self, messages: Sequence[Message]) -> set[int]:
        """Return the answers to learn."""
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if self._spec.train_on == "last":
            answers = answers[-1:]
        return {i for i in answers if messages[i].weight > 0}

    def _spells_control(self, conversation: Conversation) -> bool:
        search = self._renderer.control_token.search
        return any(search(f"{m.content}\n{m.reasoning}") for m in conversation.messages)

    def _rows(
        self, conversation: Conversation, chosen: set[int]
    ) -> Iterator[tuple[list[int], set[int], bool]]:
        """Yield message indices, the answers to learn among them, and whether the newest matter."""
        whole = list(range(len(conversation.messages)))
        chat, tools = conversation.as_chat(), conversation.tool_schemas()
        text = self._renderer.render(chat, tools)
        lost = {i for i in chosen if self._renderer.find_turn(chat, tools, i, text) is None}
        if chosen - lost or self._spec.train_on == "everything":
            yield whole, chosen - lost, self._spec.train_on == "last"
        for i in sorted(lost):
            yield whole[: i + 1], {i}, True

    def _fit(
        self, conversation: Conversation, indices: list[int], learnt: set[int], keep_newest: bool
    ) -> tuple[EncodedChat, int]:
        """Encode the messages, less as many whole turns as do not fit; return the number cut.

        The newest turns go, so that what remains is a beginning as the model would see it. Where
        only the last answer is learnt the oldest go instead.
        """
        messages = conversation.messages
        limit = self._spec.max_length
        for kept in _shortened(messages, indices, keep_newest):
            wanted = learnt & set(kept)
            if not wanted and self._spec.train_on != "everything":
                break
            chat = self._encode_messages(conversation, kept, wanted)
            if limit is None or len(chat.input_ids) <= limit:
                return chat, len(learnt) - len(wanted)
        raise TooLongError(f"longer than data.max_length={limit}")

    def _encode_messages(
        self, conversation: Conversation, kept: list[int], learnt: set[int]
    ) -> EncodedChat:
        messages = [conversation.messages[i] for i in kept]
        chat, tools = Conversation(tuple(messages)).as_chat(), conversation.tool_schemas()
        text = self._renderer.render(chat, tools)
        encoding = self._backend.encode(text, add_special_tokens=False)
        everything = self._spec.train_on == "everything"
        weights = np.full(len(encoding.ids), float(everything), np.float32)
        positions = Positions(encoding)
        ids, appended, learnt_text, stretches = encoding.ids, 0.0, [], []
        for at, index in enumerate(kept):
            if index not in learnt and not (everything and messages[at].role == "assistant"):
                continue
            turn = self._renderer.find_turn(chat, tools, at, text)
            if turn is None:
                if index in learnt:
                    raise RowError("chat template: the answer is not found in what it renders")
                continue
            first, stop = positions.first(turn.start), self._stop(ids, positions, turn)
            weight = messages[at].weight
            weights[first : stop or positions.stop(turn.end)] = weight
            if stop is None and at == len(kept) - 1:
                appended = weight
            if weight > 0:
                learnt_text.append(text[turn.start : turn.content_end])
                stretches.append((turn.start, positions.end_of(stop) if stop else turn.end))
        if appended and self._ids_of_end:
            ids, weights = [*ids, *self._ids_of_end], np.append(weights, np.float32(appended))
        weights[:1] = 0  # nothing predicts the first token
        spoken = text if everything else "".join(learnt_text)
        return EncodedChat(
            input_ids=np.array(ids, self.dtype),
            weights=weights,
            num_chars=len(spoken),
            num_bytes=len(spoken.encode()),
            num_turns=sum(message.role == "assistant" for message in messages),
            text=text,
            learnt=((0, len(text)),) if everything else tuple(stretches),
        )

    def _stop(self, ids: list[int], positions: Positions, turn: Turn) -> int | None:
        """Return the place after the token that ends a turn, None when there is none.

        That is the end token in the turn's closing, else the first control token there, else a
        control token that opens the next turn.
        """
        begin, end = positions.stop(turn.content_end), positions.stop(turn.end)
        closing = range(begin, end)
        for is_end in (self._ids_of_end.__contains__, self.control_ids.__contains__):
            for i in closing:
                if is_end(ids[i]):
                    return i + 1
        opens = end < len(ids) and ids[end] in self.control_ids
        if opens and ids[end] != self._spec.encoder.bos_token_id:
            return end + 1
        return None


class Positions:
    """Which tokens stand where in a text.

    Several tokens may share the characters of one that was split into bytes, and a token may reach
    over the start of an answer.
    """

    def __init__(self, encoding: Encoding) -> None:
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        self._starts, self._ends = offsets[:, 0], offsets[:, 1]

    def first(self, char: int) -> int:
        """Return the first token that reaches beyond ``char``, one that begins before it too."""
        return int(np.searchsorted(self._ends, char, side="right"))

    def stop(self, char: int) -> int:
        """Return the first token that begins at ``char`` or later."""
        return int(np.searchsorted(self._starts, char, side="left"))

    def end_of(self, stop: int) -> int:
        """Return the character after the last of the first ``stop`` tokens."""
        return int(self._ends[stop - 1])


def _shortened(
    messages: Sequence[Message], indices: list[int], keep_newest: bool
) -> Iterator[list[int]]:
    """Yield ``indices``, then with ever fewer whole turns; a system message always stays."""
    head = [i for i in indices[:1] if messages[i].role == "system"]
    rest = indices[len(head) :]
    opens = [at for at, i in enumerate(rest) if messages[i].role == "user" and at > 0]
    yield indices
    for at in opens if keep_newest else reversed(opens):
        yield head + (rest[at:] if keep_newest else rest[:at])


def encode_conversation(
    tokenizer: PreTrainedTokenizerFast,
    conversation: Conversation,
    *,
    template: str | None = None,
    train_on: TrainOn = "assistant",
    system: str | None = None,
    max_length: int | None = None,
) -> EncodedRow:
    """Encode one conversation with a loaded tokenizer; see ``ChatEncoder`` for many.

    Args:
        tokenizer: with a chat template, unless ``template`` gives one.
        conversation: the messages.
        template: Jinja text.
        train_on: learn every answer, the last one, or everything.
        system: put before a conversation without a system message.
        max_length: tokens; None = no limit.

    Raises:
        RowError: it cannot be encoded; the message says why.
    """
    text = template or str(tokenizer.get_chat_template())
    spec = ChatSpec.of(tokenizer, text, train_on=train_on, system=system, max_length=max_length)
    return ChatEncoder(spec).encode(conversation)


def stop_token_ids(tokenizer: PreTrainedTokenizerFast, template: str | None = None) -> list[int]:
    """Return the ids that end an answer, the tokenizer's end token among them.

    Args:
        tokenizer: with a chat template, unless ``template`` gives one.
        template: Jinja text.
    """
    text = template or str(tokenizer.get_chat_template())
    encoder = ChatEncoder(ChatSpec.of(tokenizer, text))
    question, answer = Message("user", "?"), Message("assistant", MARK)
    call = Message("assistant", "", ({"name": "f", "arguments": {}},))
    tool = ({"name": "f", "description": "f", "parameters": {"type": "object", "properties": {}}},)
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    for conversation in (
        Conversation((question, answer, question, answer)),
        Conversation((question, call, Message("tool", "1"), answer), tool),
    ):
        try:
            row = encoder.encode(conversation)
        except RowError:
            continue  # a template without calls: its answers end as the others do
        for chat in row.chats:
            targets = chat.weights > 0
            ends = np.flatnonzero(targets & ~np.append(targets[1:], False))
            found += [int(i) for i in chat.input_ids[ends] if int(i) in encoder.control_ids]
    return list(dict.fromkeys(found))


def prompt_text(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return what a model is given to answer ``messages``, as text.

    Raises:
        RowError: the template refuses these messages.
    """
    return _apply(tokenizer, messages, tools, tokenize=False)


def prompt_ids(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Return what a model is given to answer ``messages``, as token ids.

    Raises:
        RowError: the template refuses these messages.
    """
    return list(_apply(tokenizer, messages, tools, tokenize=True, return_dict=False))


def _apply(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    **options: Any,
) -> Any:
    conversation = Conversation(tuple(messages), tuple(map(dict, tools)))
    try:
        return tokenizer.apply_chat_template(
            conversation.as_chat(),
            tools=conversation.tool_schemas(),
            add_generation_prompt=True,
            **options,
        )
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise RowError(f"chat template: {error or type(error).__name__}") from error
