"""Records that keep several: SQuAD's articles and paragraphs, seed tasks, lists in an object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.data.reading.answer_columns import guess_answers
from trainer.data.reading.columns import guess_columns
from trainer.data.reading.raw import RowError

BELOW = {"data": "paragraphs", "paragraphs": "qas"}  # SQuAD 1.1, arXiv:1606.05250
TELLING = {**BELOW, "qas": "question", "instances": "output"}  # a key that the objects inside have
SPREAD = "input"  # OpenAI's files of preferences keep messages and tools of the prompt below it
WRAPPERS = ("data", "rows", "items", "records", "examples", "資料", "数据")
SHARED = ("instruction", "context")  # what all questions of a record have in common


def find_nesting(record: Mapping[str, Any]) -> str:
    """Return the key under which a record keeps several questions, "" when it is one itself."""
    for name, key in TELLING.items():
        inner = record.get(name)
        if isinstance(inner, list) and inner and isinstance(inner[0], dict) and key in inner[0]:
            return name
    spread = record.get(SPREAD)
    if isinstance(spread, dict) and isinstance(spread.get("messages"), list):
        return SPREAD
    for name in WRAPPERS:
        inner = record.get(name)
        if isinstance(inner, list) and inner and isinstance(inner[0], dict):
            guessed = guess_columns(map(str, inner[0]))
            told = "messages" in guessed or {"prompt", "response"} <= set(guessed)
            if told or "chosen" in guess_answers(map(str, inner[0])):
                return name
    return ""


def unnest(record: Mapping[str, Any], nested: str) -> Iterator[dict[str, Any]]:
    """Yield the questions of a record, each with what it shares with the others; usually several.

    Raises:
        RowError: the record has none under the key ``nested``.
    """
    inner = record.get(nested)
    if nested == SPREAD and isinstance(inner, dict):
        yield {**{key: value for key, value in record.items() if key != SPREAD}, **inner}
        return
    if not isinstance(inner, list) or not inner:
        raise RowError(f"no {nested} in the record; its keys are {', '.join(map(str, record))}")
    for value in inner:
        if not isinstance(value, dict):
            raise RowError(f"{nested} holds {type(value).__name__}, not an object")
        if nested in BELOW and isinstance(value.get(BELOW[nested]), list):
            yield from unnest(value, BELOW[nested])
        else:
            yield {**{key: record[key] for key in SHARED if key in record}, **value}
