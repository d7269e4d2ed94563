"""An answer as it grows: tokens in, whole characters out, ended by a token or a text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Turns tokens into text piece by piece.

    A character may be spread over several byte tokens: nothing is returned until it is whole. Bytes
    that never become a character have no text.

    Args:
        tokenizer: decodes.
        show_special: whether control tokens have a text, for parsers that look for them.
    """

    def __init__(self, tokenizer: Any, show_special: bool = False) -> None:
        self._tokenizer, self._show_special = tokenizer, show_special
        self._token_ids: list[int] = []
        self._start = 0  # of the tokens that are decoded again, because spaces depend on them
        self._read = 0  # of the tokens whose text was returned

    def feed(self, token_id: int) -> str:
        """Return the text that ``token_id`` completes, perhaps none."""
        self._token_ids.append(token_id)
        old = self._decode(self._token_ids[self._start : self._read])
        new = self._decode(self._token_ids[self._start :])
        if new.endswith(REPLACEMENT) or len(new) <= len(old):
            return ""
        self._start, self._read = self._read, len(self._token_ids)
        return new[len(old) :].replace(REPLACEMENT, "")

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=not self._show_special))


class AnswerStream:
    """Follows one answer token by token.

    White space before its first character is dropped: whether a template or the model writes the
    space between the two differs between tokenizers.

    Args:
        tokenizer: decodes the tokens.
        stop_ids: tokens that end the answer.
        stop: texts that end the answer; neither they nor a part of them is passed on.
        max_new_tokens: tokens after which the answer is cut.
        on_text: called with every new piece of text.
        show_special: whether control tokens have a text.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_ids: Collection[int],
        stop: Sequence[str],
        max_new_tokens: int,
        on_text: Callable[[str], None] = lambda text: None,
        show_special: bool = False,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, show_special)
        self._stop_ids, self._stop = stop_ids, stop
        self._max_new_tokens, self._on_text = max_new_tokens, on_text
        self._held = ""  # may be the start of a stop text
        self.text = ""
        self.token_ids: list[int] = []  # all that were computed, an end token among them
        self.finish_reason = ""  # stop | length, OpenAI's words; empty while the answer goes on

    def feed(self, token_id: int) -> bool:
        """Take one token; return whether the answer has ended. What follows its end is ignored."""
        if self.finish_reason:
            return True
        self.token_ids.append(token_id)
        if token_id in self._stop_ids:
            self.end("stop")
            return True
        self._held += self._detokenizer.feed(token_id)
        found = [at for at in (self._held.find(text) for text in self._stop) if at >= 0]
        if found:
            self._held = self._held[: min(found)]
            self.end("stop")
            return True
        self._pass_on(len(self._held) - self._num_suspicious())
        if len(self.token_ids) == self._max_new_tokens:
            self.end("length")
        return bool(self.finish_reason)

    def end(self, reason: str) -> None:
        """End the answer for ``reason``, passing on what was held back."""
        self._pass_on(len(self._held))
        self.finish_reason = reason

    def _pass_on(self, num_chars: int) -> None:
        piece, self._held = self._held[:num_chars], self._held[num_chars:]
        if not self.text:
            piece = piece.lstrip()
        if piece:
            self.text += piece
            self._on_text(piece)

    def _num_suspicious(self) -> int:
        """Return the length of the longest end of the held text that may begin a stop text."""
        longest = max(map(len, self._stop), default=0)
        lengths = range(min(longest - 1, len(self._held)), 0, -1)
        return next((n for n in lengths if self._may_begin(self._held[-n:])), 0)

    def _may_begin(self, end: str) -> bool:
        return any(text.startswith(end) for text in self._stop)
