"""What every reader of files yields: a row as it stands there, not yet judged."""

from __future__ import annotations

from typing import Any, NamedTuple


class RowError(ValueError):
    """Why one row cannot become a document or a conversation."""


class BadCell(NamedTuple):
    """A cell of a table that has no usable value; it spoils its row only if its column is read."""

    reason: str


class Row(NamedTuple):
    """A raw row: its 1-based line or record, its size, its undecoded content."""

    number: int
    num_bytes: int
    value: bytes | dict[str, Any] | RowError


def printable(text: str) -> str:
    """Return ``text`` with lone surrogates escaped, which no terminal or file would take."""
    return text.encode("utf-8", "backslashreplace").decode()
