"""Parts of a conversation: which of its messages, tokens and characters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding

from trainer.data.chats.conversation import Message
from trainer.data.chats.rendering import Rendered


@dataclass(frozen=True)
class Part:
    """Messages to encode together, by index, and the answers to learn among them.

    Too long, it loses its newest turns, so that what remains is a beginning as the model would see
    it; where only the last answer is learnt it loses the oldest instead.

    Attributes:
        indices: of the messages.
        learnt: those to learn.
        keep_newest: lose the oldest.
        rendered: all of it, where that is done already.
    """

    indices: list[int]
    learnt: set[int]
    keep_newest: bool
    rendered: Rendered | None = None

    def shortened(self, messages: Sequence[Message]) -> Iterator[list[int]]:
        """Yield the indices, then with ever fewer whole turns; a system message always stays."""
        head = [i for i in self.indices[:1] if messages[i].role == "system"]
        rest = self.indices[len(head) :]
        opens = [at for at, i in enumerate(rest) if messages[i].role == "user" and at > 0]
        yield self.indices
        for at in opens if self.keep_newest else reversed(opens):
            yield head + (rest[at:] if self.keep_newest else rest[:at])


@dataclass(frozen=True)
class Span:
    """An answer in an encoded text.

    Attributes:
        first: its first token.
        stop: the token after its last, which is the one that ends it where there is one.
        start: its first character.
        content_end: end of what it says.
        end: end of what is learnt.
        has_end: whether a control token ends it.
    """

    first: int
    stop: int
    start: int
    content_end: int
    end: int
    has_end: bool


class Positions:
    """Which tokens stand where in a text.

    Several tokens may share the characters of one that was split into bytes, and a token may reach
    over the start of an answer.

    Args:
        encoding: of the text, with offsets in characters.
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
