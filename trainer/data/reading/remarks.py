"""Remarks: what a reader of data should know of rows that were accepted all the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

SENTENCES = {
    "trailing_turns": "conversations ended without an answer: their last turns were left out",
    "greetings": "conversations began with an assistant's turn: it was left out",
    "placeholders": "conversations hold template placeholders such as {{name}}: fill them in",
    "outer_space": "conversations have answers that begin or end with white space",
    "replacement_characters": "conversations hold U+FFFD, a character lost before",
    "user_weights": "conversations give user or tool messages a loss weight: not trained all the "
    "same, see data.train_on",
    "undeclared_tools": "conversations call functions that their tools do not declare",
    "unread_columns": "conversations fill a column named input, system, history or tools that is "
    "not read: name it in the source's columns",
    "other_responses": "pairs come with a response that is neither the chosen nor the rejected "
    "answer: it is not read",
    "negative_margins": "pairs have a margin below 0: the chosen answer scores below the rejected",
    "duplicates": "conversations occurred before, word for word",
}


class Remarks:
    """Count remarks by kind; kinds are the keys of ``SENTENCES``.

    Counts of several processes add up with ``merge``; ``counts`` is plain data for a manifest.
    """

    def __init__(self, counts: Mapping[str, int] | None = None) -> None:
        self._counts: Counter[str] = Counter()
        self.merge(counts or {})

    @property
    def counts(self) -> dict[str, int]:
        """Number of conversations by kind, those above 0 only, in a fixed order."""
        return {kind: self._counts[kind] for kind in SENTENCES if self._counts[kind]}

    def note(self, kind: str) -> None:
        """Count one conversation."""
        if kind not in SENTENCES:
            raise KeyError(kind)
        self._counts[kind] += 1

    def merge(self, counts: Mapping[str, int]) -> None:
        """Add the counts of another process or file."""
        for kind, number in counts.items():
            if kind not in SENTENCES:
                raise KeyError(kind)
            self._counts[kind] += number

    def lines(self) -> Iterator[str]:
        """Yield a sentence for each kind that occurred."""
        for kind, number in self.counts.items():
            yield f"{number:,} {SENTENCES[kind]}"
