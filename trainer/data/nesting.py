"""Records that keep several questions: SQuAD's articles and paragraphs, and seed tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.data.raw import RowError

BELOW = {"data": "paragraphs", "paragraphs": "qas"}  # SQuAD 1.1, arXiv:1606.05250
TELLING = {**BELOW, "qas": "question", "instances": "output"}  # a key that the objects inside have
SHARED = ("instruction", "context")  # what all questions of a record have in common


def find_nesting(record: Mapping[str, Any]) -> str:
    """Return the key under which a record keeps several questions, "" when it is one itself."""
    for name, key in TELLING.items():
        inner = record.get(name)
        if isinstance(inner, list) and inner and isinstance(inner[0], dict) and key in inner[0]:
            return name
    return ""


def unnest(record: Mapping[str, Any], nested: str) -> Iterator[dict[str, Any]]:
    """Yield the questions of a record, each with what it shares with the others.

    Raises:
        RowError: the record has none under the key ``nested``.
    """
    inner = record.get(nested)
    if not isinstance(inner, list) or not inner:
        raise RowError(f"no {nested} in the record; its keys are {', '.join(map(str, record))}")
    for value in inner:
        if not isinstance(value, dict):
            raise RowError(f"{nested} holds {type(value).__name__}, not an object")
        if nested in BELOW:
            yield from unnest(value, BELOW[nested])
        else:
            yield {**{key: record[key] for key in SHARED if key in record}, **value}
