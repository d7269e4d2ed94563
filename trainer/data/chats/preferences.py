"""From one record of a file to preferences: a prompt with a better and a worse answer to it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, zip_longest
from typing import Any

from trainer.data.chats.chat_rows import (
    checked_conversation,
    spoken_messages,
    value_of,
    with_system,
)
from trainer.data.chats.conversation import Conversation, Message
from trainer.data.chats.layouts import Layout
from trainer.data.chats.messages import as_text, read_messages
from trainer.data.chats.preference_search import read_label
from trainer.data.chats.tool_calls import parse_json
from trainer.data.chats.transcripts import is_transcript, read_transcript
from trainer.data.reading.raw import RowError
from trainer.data.reading.remarks import Remarks

SIDES = ("chosen", "rejected")


class EqualAnswersError(RowError):
    """Two answers that say the same."""


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, or one answer that is known to be good or bad.

    Attributes:
        prompt: everything before the answers.
        chosen: the better answer; None of a lone bad one.
        rejected: the worse answer; None of a lone good one.
        margin: by how much the chosen one is better; 0 where nobody said.
    """

    prompt: Conversation
    chosen: Message | None
    rejected: Message | None
    margin: float = 0.0

    def whole(self, answer: Message) -> Conversation:
        """Return the prompt with an answer."""
        return replace(self.prompt, messages=(*self.prompt.messages, answer))


def read_preferences(
    record: dict[str, Any], layout: Layout, remarks: Remarks | None = None
) -> tuple[list[Preference], list[RowError]]:
    """Return the preferences of one record: one, or several of a ranked list.

    Args:
        record: a JSON object, or a row of a table by column.
        layout: where things are, with ``preference`` set.
        remarks: counts what was noticed about an accepted record.

    Returns:
        The preferences, and why others of a ranked list are none.

    Raises:
        RowError: with the reason there is no preference in the record.
    """
    noticed = Remarks()
    found: list[Preference] = []
    reasons: list[RowError] = []
    if layout.preference == "ranked":
        found, reasons = _ranked(record, layout, noticed)
    elif layout.preference == "labels":
        found = [_labelled(record, layout, noticed)]
    else:
        found = [_pair(record, layout, noticed)]
    if remarks is not None:
        remarks.merge(noticed.counts)
    return found, reasons


def best_messages(record: dict[str, Any], layout: Layout, remarks: Remarks) -> list[Message]:
    """Return the messages of one record with its best answer, if it has a good one, as the last.

    Raises:
        RowError: with the reason there are none.
    """
    if layout.preference == "labels":
        messages = spoken_messages(record, layout, remarks)
        is_bad = read_label(value_of(record, layout, "label")) is not True
        is_answered = bool(messages) and messages[-1].role == "assistant"
        return messages[:-1] if is_answered and is_bad else messages
    if layout.preference == "ranked":
        answers = value_of(record, layout, "response")
        asked = spoken_messages(record, layout.asking, remarks)
        best = as_text(answers[0], "answer 1") if isinstance(answers, list) and answers else ""
        return [*asked, Message("assistant", best)]
    asked, space = _asked(record, layout, remarks)
    return _side(record, layout, "chosen", asked, space, remarks)


def _labelled(record: dict[str, Any], layout: Layout, remarks: Remarks) -> Preference:
    column = layout.column("label")
    label = read_label(value_of(record, layout, "label"))
    if label is None:
        value = str(value_of(record, layout, "label"))[:40]
        raise RowError(f"column {column!r} holds {value!r}, which is no label (true or false)")
    whole = replace(layout, prompts=False)
    messages = spoken_messages(record, whole, remarks)
    *asked, answer = _checked(messages, record, whole, remarks).messages
    answer = replace(answer, weight=1.0)
    prompt = checked_conversation(list(asked), record, layout.asking, Remarks())
    return Preference(prompt, answer if label else None, None if label else answer)


def _checked(
    messages: list[Message], record: dict[str, Any], layout: Layout, remarks: Remarks
) -> Conversation:
    """Check a conversation whose last answer is learnt, whatever its weight was."""
    last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=None)
    weighted = [replace(m, weight=1.0) if i == last else m for i, m in enumerate(messages)]
    return checked_conversation(weighted, record, replace(layout, prompts=False), remarks)


def _ranked(
    record: dict[str, Any], layout: Layout, remarks: Remarks
) -> tuple[list[Preference], list[RowError]]:
    answers = value_of(record, layout, "response")
    if not isinstance(answers, list) or len(answers) < 2:
        raise RowError(f"column {layout.column('response')!r} holds no list of ranked answers")
    asked = spoken_messages(record, layout.asking, remarks)
    texts = [as_text(text, f"answer {number}") for number, text in enumerate(answers, 1)]
    wanted = list(combinations(range(len(texts)), 2))
    if layout.ranked_pairs == "best":
        wanted = [(0, worse) for worse in range(1, len(texts))]
    found: list[Preference] = []
    reasons: list[RowError] = []
    for better, worse in wanted:
        sides = [[*asked, Message("assistant", texts[i])] for i in (better, worse)]
        try:
            found.append(_compare(sides, record, layout, remarks))
        except RowError as error:
            reasons.append(type(error)(f"answers {better + 1} and {worse + 1}: {error}"))
    if not found:
        raise reasons[0]
    return found, reasons


def _pair(record: dict[str, Any], layout: Layout, remarks: Remarks) -> Preference:
    asked, space = _asked(record, layout, remarks)
    sides = [_side(record, layout, name, asked, space, remarks) for name in SIDES]
    preference = _compare(sides, record, layout, remarks)
    response = layout.column("response")
    if response is not None and record.get(response):
        answers = [record.get(layout.column(name) or "") for name in SIDES]
        if record[response] not in answers:
            remarks.note("other_responses")
    margin = _margin(record, layout)
    if margin < 0:
        remarks.note("negative_margins")
    return replace(preference, margin=margin)


def _asked(record: dict[str, Any], layout: Layout, remarks: Remarks) -> tuple[list[Message], str]:
    """Return the prompt of its own columns, if there are any, and what parts it from an answer."""
    if not any(layout.column(name) for name in ("messages", "prompt")):
        return [], ""
    asked = spoken_messages(record, layout.asking, remarks)
    *before, last = asked or [Message("system", "")]
    if last.role != "user" or not is_transcript(last.content):
        return asked, ""
    turns = read_transcript(last.content)
    if turns[-1].role == "assistant" and not turns[-1].content.strip():
        turns.pop()  # "Assistant:" opens the answer
    return [*before, *turns], " "


def _side(
    record: dict[str, Any],
    layout: Layout,
    name: str,
    asked: list[Message],
    space: str,
    remarks: Remarks,
) -> list[Message]:
    """Return the conversation with one answer, whose column may hold all of it."""
    column = layout.column(name)
    where = f"column {column!r}"
    if column not in record:
        raise RowError(f"no {where}; the row has {', '.join(map(str, record))[:200]}")
    value = record[column]
    if layout.answer_form == "transcripts":
        turns = read_transcript(as_text(value, where))
        return with_system(turns, record, layout)
    if layout.answer_form == "text":
        return [*asked, Message("assistant", as_text(value, where).removeprefix(space))]
    value = parse_json(value, where)
    if value is not None and not isinstance(value, (list, dict)):
        raise RowError(f"{where} holds {type(value).__name__}, not messages")
    spoken = read_messages([value] if isinstance(value, dict) else value or [], layout, remarks)
    if asked and (not spoken or spoken[0].role not in ("system", "user")):
        return [*asked, *spoken]
    if asked and asked[-1] not in spoken:
        raise RowError(f"{where} holds a conversation without the prompt of its row")
    if asked and asked[0].role == "system" and spoken[0].role != "system":
        spoken = [asked[0], *spoken]
    return with_system(spoken, record, layout)


def _compare(
    sides: list[list[Message]], record: dict[str, Any], layout: Layout, remarks: Remarks
) -> Preference:
    """Return two conversations as one prompt with two answers; margins are not yet known."""
    noticed, wholes = Remarks(), []
    for name, messages in zip(SIDES, sides, strict=True):
        try:
            wholes.append(_checked(messages, record, layout, noticed))
        except RowError as error:
            raise RowError(f"{name}: {error}") from error
    for kind in noticed.counts:
        if kind not in remarks.counts:  # a record is remarked once
            remarks.note(kind)
    asked, others = (_as_context(whole.messages[:-1]) for whole in wholes)
    if asked != others:
        number = next(_differing(asked, others))
        raise RowError(f"chosen and rejected answer different prompts, from message {number} on")
    chosen, rejected = (whole.messages[-1] for whole in wholes)
    if chosen == rejected:
        raise EqualAnswersError("the chosen and the rejected answer are equal")
    return Preference(replace(wholes[0], messages=asked), chosen, rejected)


def _as_context(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return messages whose answers are not learnt, so that their weights do not matter."""
    return tuple(replace(message, weight=1.0) for message in messages)


def _differing(asked: tuple[Message, ...], others: tuple[Message, ...]) -> Iterator[int]:
    """Yield the numbers of the messages in which two prompts differ."""
    pairs = zip_longest(asked, others)
    yield from (number for number, (one, other) in enumerate(pairs, 1) if one != other)


def _margin(record: dict[str, Any], layout: Layout) -> float:
    margin = _number(record, layout, "margin")
    if margin is not None:
        return margin
    chosen, rejected = (_number(record, layout, f"{name}_score") for name in SIDES)
    return 0.0 if chosen is None or rejected is None else chosen - rejected


def _number(record: dict[str, Any], layout: Layout, name: str) -> float | None:
    """Return a number of the record, None where there is none."""
    column = layout.column(name)
    text = as_text(value_of(record, layout, name), f"column {column!r}").strip()
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise RowError(f"column {column!r} holds {text[:40]!r}, which is no number")
    return number
