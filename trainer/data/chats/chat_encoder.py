"""Conversations to token ids and one loss weight per token.

The ids are those of ``tokenizer.apply_chat_template``. Each answer is learnt from its first token
to the token that ends it, which is always learnt; nothing of what the template writes after that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from trainer.data.chats.chat_parts import Part, Positions, Span
from trainer.data.chats.conversation import Conversation, Message
from trainer.data.chats.rendering import Rendered, Renderer, Turn, hides_thoughts
from trainer.data.encode import EncoderSpec, token_dtype
from trainer.data.reading.rows import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
    from typing_extensions import Self

TrainOn = Literal["assistant", "last", "everything"]


class TooLongError(RowError):
    """Not one turn of a conversation fits into ``data.max_length``.

    Args:
        limit: that length.
        num_tokens: tokens of the whole conversation.
    """

    def __init__(self, limit: int | None, num_tokens: int) -> None:
        super().__init__(f"longer than data.max_length={limit}: {num_tokens} tokens")
        self.num_tokens = num_tokens


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
    def of(cls, tokenizer: PreTrainedTokenizerFast, template: str, **options: Any) -> Self:
        """Describe a loaded tokenizer with ``template``, the Jinja text."""
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        return cls(EncoderSpec.of(tokenizer), template, special, **options)

    def identity(self) -> dict[str, Any]:
        """Return what decides the encoding besides the tokenizer, for the name of a store."""
        return {
            "template": self.template,
            "special_tokens": dict(self.special_tokens),
            "train_on": self.train_on,
            "system": self.system,
            "max_length": self.max_length,
        }

    def build(self) -> ChatEncoder:
        """Return what encodes conversations."""
        return ChatEncoder(self)


@dataclass(frozen=True)
class EncodedChat:
    """What one row of training is made from.

    Attributes:
        input_ids: ``[tokens]``.
        weights: ``[tokens]`` float32 factors of the loss of predicting each token; 0 = no target.
        num_chars: characters of the learnt text, without what the template adds.
        num_bytes: its UTF-8 bytes.
        answers: indices of the messages that are learnt.
        text: the rendered conversation.
        learnt: the stretches of ``text`` that are learnt, as (start, end).
    """

    input_ids: NDArray[Any]
    weights: NDArray[np.float32]
    num_chars: int
    num_bytes: int
    answers: tuple[int, ...]
    text: str
    learnt: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class EncodedRow:
    """One conversation, as one or several rows of training.

    Attributes:
        chats: usually one; templates that leave old thoughts out need one for each such answer.
        num_turns: answers that were to be learnt.
        num_turns_cut: those left out because of ``max_length``.
        num_tokens: of the whole conversation.
        spells_control: whether a message spells a token such as ``</s>``, which is read as one.
        hides_thoughts: whether the template leaves out thoughts of an answer that is learnt.
    """

    chats: list[EncodedChat]
    num_turns: int
    num_turns_cut: int
    num_tokens: int
    spells_control: bool
    hides_thoughts: bool


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
        self._end_ids = frozenset({spec.encoder.eos_token_id} - {None})
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
        chats: list[EncodedChat] = []
        num_cut = num_tokens = 0
        for part in self._parts(conversation, chosen):
            chat, num_full = self._fit(conversation, part)
            num_tokens = max(num_tokens, num_full)
            num_cut += len(part.learnt) - (len(chat.answers) if chat else 0)
            if chat is not None:
                chats.append(chat)
        if not chats:
            raise TooLongError(self._spec.max_length, num_tokens)
        messages = conversation.messages
        return EncodedRow(
            chats,
            len(chosen),
            num_cut,
            num_tokens,
            self._spells_control(conversation),
            any(hides_thoughts(chat.text, [messages[i] for i in chat.answers]) for chat in chats),
        )

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

    def _parts(self, conversation: Conversation, chosen: set[int]) -> Iterator[Part]:
        """Yield the whole conversation, then a beginning for each answer it does not hold."""
        whole = list(range(len(conversation.messages)))
        rendered = self._render(conversation, whole, chosen)
        lost = {i for i in chosen if rendered.turns[i] is None}
        if chosen - lost or self._spec.train_on == "everything":
            keep_newest = self._spec.train_on == "last"
            held = Rendered(rendered.text, {i: t for i, t in rendered.turns.items() if t})
            yield Part(whole, chosen - lost, keep_newest=keep_newest, rendered=held)
        for i in sorted(lost):
            yield Part(whole[: i + 1], {i}, keep_newest=True)

    def _render(
        self, conversation: Conversation, kept: Sequence[int], learnt: set[int]
    ) -> Rendered:
        """Render some of the messages and find those to learn among them, by their place there."""
        messages = tuple(conversation.messages[i] for i in kept)
        everything = self._spec.train_on == "everything"
        wanted = [
            at
            for at, index in enumerate(kept)
            if index in learnt or (everything and messages[at].role == "assistant")
        ]
        chat = Conversation(messages).as_chat()
        return self._renderer.locate(chat, conversation.tool_schemas(), wanted)

    def _fit(self, conversation: Conversation, part: Part) -> tuple[EncodedChat | None, int]:
        """Encode a part, less as many whole turns as do not fit.

        Returns:
            what fits, None where nothing to learn does; and the tokens of all of it.
        """
        limit, num_full, rendered = self._spec.max_length, 0, part.rendered
        for kept in part.shortened(conversation.messages):
            learnt = part.learnt & set(kept)
            if not learnt and self._spec.train_on != "everything":
                break
            rendered = rendered or self._render(conversation, kept, learnt)
            messages = [conversation.messages[i] for i in kept]
            chat = self._encode_rendered(rendered, messages, sorted(learnt))
            num_full = max(num_full, len(chat.input_ids))
            if limit is None or len(chat.input_ids) <= limit:
                return chat, num_full
            rendered = None
        return None, num_full

    def _encode_rendered(
        self, rendered: Rendered, messages: Sequence[Message], answers: list[int]
    ) -> EncodedChat:
        text, everything = rendered.text, self._spec.train_on == "everything"
        encoding = self._backend.encode(text, add_special_tokens=False)
        spans = self._spans(rendered, encoding)
        ids = list(encoding.ids)
        weights = np.full(len(ids), float(everything), np.float32)
        for at, span in spans.items():
            weights[span.first : span.stop] = messages[at].weight
        closes = spans.get(len(messages) - 1)
        eos = self._spec.encoder.eos_token_id
        if closes is not None and not closes.has_end and eos is not None:
            # The template ends no answer: without this nothing would teach a model to stop.
            ids.append(eos)
            weights = np.append(weights, np.float32(messages[-1].weight))
        weights[:1] = 0  # nothing predicts the first token
        trained = [span for at, span in spans.items() if messages[at].weight > 0]
        spoken = text if everything else "".join(text[s.start : s.content_end] for s in trained)
        return EncodedChat(
            input_ids=np.array(ids, self.dtype),
            weights=weights,
            num_chars=len(spoken),
            num_bytes=len(spoken.encode()),
            answers=tuple(answers),
            text=text,
            learnt=((0, len(text)),) if everything else tuple((s.start, s.end) for s in trained),
        )

    def _spans(self, rendered: Rendered, encoding: Encoding) -> dict[int, Span]:
        """Return which tokens and characters each answer is, by the place of its message."""
        positions, spans = Positions(encoding), {}
        for at, turn in rendered.turns.items():
            if turn is None:
                # Learning everything, what the text does not hold of an answer is not missed.
                if self._spec.train_on == "everything":
                    continue
                raise RowError("chat template: the answer is not found in what it renders")
            first, stop = positions.first(turn.start), self._stop(encoding.ids, positions, turn)
            last = stop if stop is not None else positions.stop(turn.end)
            end = turn.end if stop is None else positions.end_of(stop)
            spans[at] = Span(first, last, turn.start, turn.content_end, end, stop is not None)
        return spans

    def _stop(self, ids: list[int], positions: Positions, turn: Turn) -> int | None:
        """Return the place after the token that ends a turn, None when there is none.

        That is the end token in the turn's closing, else the first control token there, else a
        control token that opens the next turn.
        """
        begin, end = positions.stop(turn.content_end), positions.stop(turn.end)
        closing = range(begin, end)
        for is_end in (self._end_ids.__contains__, self.control_ids.__contains__):
            for i in closing:
                if is_end(ids[i]):
                    return i + 1
        opens = end < len(ids) and ids[end] in self.control_ids
        return end + 1 if opens and ids[end] != self._spec.encoder.bos_token_id else None
