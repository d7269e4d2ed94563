"""Whether a file says which answer is better, and how: told by its columns and what they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.data.chats.layouts import AnswerForm, Content, Preference
from trainer.data.chats.messages import ROLE_KEYS
from trainer.data.chats.tool_calls import parse_json
from trainer.data.chats.transcripts import is_transcript
from trainer.data.reading.answer_columns import ANSWER_NAMES, guess_answers
from trainer.data.reading.columns import list_headers
from trainer.data.reading.raw import RowError
from trainer.errors import DataError

PREFERENCES = ({"chosen", "rejected"}, {"chosen_messages", "rejected_messages"})
LABELS = {
    **dict.fromkeys(("true", "1", "yes", "y", "good", "是", "好", "對", "对"), True),
    **dict.fromkeys(("false", "0", "no", "n", "bad", "否", "壞", "坏", "不好", "錯", "错"), False),
}

Records = Sequence[Mapping[str, Any]]


def read_label(value: object) -> bool | None:
    """Return what a label says of an answer, None when it is no label."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return LABELS.get(str(value).strip().lower())


def choose_answers(
    records: Records, headers: Sequence[str], named: Mapping[str, str]
) -> dict[str, str]:
    """Return our names of the answer columns with the file's: those ``named``, else guessed.

    A column is a label only when it holds nothing else.
    """
    free = [header for header in headers if header not in named.values()]
    explicit = {name: column for name, column in named.items() if name in ANSWER_NAMES}
    if "label" in explicit:
        return {"label": explicit["label"]} if explicit["label"] else {}
    found = guess_answers(free, explicit)
    if "label" in found and not _holds_labels(records, found["label"]):
        del found["label"]
    return found


def _holds_labels(records: Records, column: str) -> bool:
    values = [record[column] for record in records if record.get(column) is not None]
    return bool(values) and all(read_label(value) is not None for value in values)


def find_preference(records: Records, columns: Mapping[str, str]) -> Preference:
    """Return how the records say which answer is better, "" when they do not."""
    if {"chosen", "rejected"} <= set(columns):
        return "pairs"
    if "label" in columns:
        return "labels"
    ranked = (record.get(columns.get("response", "")) for record in records)
    is_squad = "context" in columns and columns.get("prompt", "").lower() == "question"
    return "ranked" if not is_squad and any(map(_is_ranking, ranked)) else ""


def _is_ranking(value: object) -> bool:
    """Tell a list of answers from one of messages."""
    return isinstance(value, list) and len(value) > 1 and isinstance(value[0], str)


def find_answer_form(records: Records, column: str) -> AnswerForm:
    """Return what the column of an answer holds."""
    values = [record[column] for record in records if record.get(column)]
    texts = [value for value in values if isinstance(value, str)]
    if 2 * sum(map(is_transcript, texts)) > len(values):
        return "transcripts"
    return "messages" if any(map(_holds_messages, values)) else "text"


def _holds_messages(value: object) -> bool:
    try:
        value = parse_json(value, "")
    except RowError:
        return False
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and bool(ROLE_KEYS & set(first))


def describe_answers(
    records: Records, columns: Mapping[str, str], ranked_pairs: str, content: Content
) -> dict[str, Any]:
    """Return the fields of a layout that say which answer is better."""
    if content == "conversations":
        return {}
    preference = find_preference(records, columns)
    form = find_answer_form(records, columns["chosen"]) if preference == "pairs" else "text"
    ranked = ranked_pairs if preference == "ranked" else ""
    return {"preference": preference, "answer_form": form, "ranked_pairs": ranked}


def refuse_others(headers: list[str], path: Path) -> None:
    """Say that a file holds no preferences, and what would be some."""
    raise DataError(
        f"{path} holds no preferences: no column is known to hold a chosen and a rejected answer, "
        "a list of answers from the best to the worst, or a label (true, false) of an answer; its "
        f"columns are {list_headers(headers)}. Name them in the source's columns: "
        '{chosen: "COLUMN", rejected: "COLUMN"}'
    )


def refuse_preferences(records: Records, headers: Sequence[str], path: Path) -> None:
    """Refuse files of preferences where conversations are wanted.

    Raises:
        DataError: saying how to read them as conversations.
    """
    if any(pair <= set(headers) for pair in PREFERENCES):
        raise DataError(
            f"{path} holds preferences (chosen and rejected); name the answer to learn with "
            "columns={prompt: ..., response: chosen} if that is meant"
        )
    is_label = [isinstance(record.get("label"), bool) for record in records]
    if all(is_label) and {"messages", "conversations", "completion"} & set(headers):
        raise DataError(
            f"{path}: its column 'label' marks answers as good or bad (KTO); keep the good ones "
            "in a file of their own, or name the columns to read them all"
        )
