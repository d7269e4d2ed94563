"""From one record of a file to one conversation."""

from __future__ import annotations

import json
from typing import Any

from trainer.data.chats.conversation import Conversation, Message
from trainer.data.chats.layouts import Layout
from trainer.data.chats.messages import as_text, read_messages
from trainer.data.chats.tool_calls import parse_json, read_tools
from trainer.data.chats.turn_order import arrange
from trainer.data.reading.raw import RowError
from trainer.data.reading.remarks import Remarks

MEDIA_COLUMNS = ("images", "videos", "audios")


def read_conversation(
    record: dict[str, Any], layout: Layout, remarks: Remarks | None = None
) -> Conversation:
    """Return the conversation of one record.

    Args:
        record: a JSON object, or a row of a table by column.
        layout: where things are.
        remarks: counts what was noticed about an accepted conversation.

    Raises:
        RowError: with the reason the record is none.
    """
    noticed = Remarks()
    messages = spoken_messages(record, layout, noticed)
    conversation = checked_conversation(messages, record, layout, noticed)
    if remarks is not None:
        remarks.merge(noticed.counts)
    return conversation


def spoken_messages(record: dict[str, Any], layout: Layout, remarks: Remarks) -> list[Message]:
    """Return the messages of one record as they stand there, in any order.

    Raises:
        RowError: with the reason there are none.
    """
    for column in MEDIA_COLUMNS:
        if isinstance(record.get(column), list) and record[column]:
            raise RowError(f"column {column!r} is filled: only text can be trained")
    if layout.keeps_messages:
        return _listed(record, layout, remarks)
    if isinstance(value_of(record, layout, "prompt"), list):
        return _listed_in_two(record, layout, remarks)
    return _asked(record, layout, remarks)


def checked_conversation(
    messages: list[Message], record: dict[str, Any], layout: Layout, remarks: Remarks
) -> Conversation:
    """Return the conversation of ``messages``, in order and with the record's tools.

    Args:
        messages: as they were read.
        record: what they were read from.
        layout: where things are.
        remarks: counts what was noticed.

    Raises:
        RowError: with the reason they are none.
    """
    tools = read_tools(value_of(record, layout, "tools"), layout.drop_nulls)
    messages = arrange(messages, remarks, layout.prompts)
    for calls in (tools, *(message.tool_calls for message in messages if message.tool_calls)):
        as_text(json.dumps(calls, ensure_ascii=False), "tools")
    read = dict(layout.columns).values()
    if any(record.get(name) and name not in read for name in _usual(layout)):
        remarks.note("unread_columns")
    declared = {tool["name"] for tool in tools}
    if any(call["name"] not in declared for m in messages for call in m.tool_calls):
        remarks.note("undeclared_tools")
    return Conversation(tuple(messages), tools)


def _usual(layout: Layout) -> tuple[str, ...]:
    """Return columns that most likely belong to a conversation where they occur."""
    return ("system", "tools") if layout.keeps_messages else ("input", "system", "history")


def value_of(record: dict[str, Any], layout: Layout, name: str) -> Any:
    """Return what the record has in our column ``name``, None without such a column."""
    column = layout.column(name)
    return None if column is None else record.get(column)


def _refuse_missing(column: str, record: dict[str, Any]) -> None:
    if column not in record:
        raise RowError(f"no column {column!r}; the row has {', '.join(map(str, record))[:200]}")


def _asked(record: dict[str, Any], layout: Layout, remarks: Remarks) -> list[Message]:
    """Read a question, what belongs to it, and its answer."""

    def text(name: str) -> str:
        return as_text(value_of(record, layout, name), f"column {layout.column(name)!r}")

    messages = [Message("system", text("system"))] if text("system").strip() else []
    messages += _history(value_of(record, layout, "history"))
    before, after = text("context"), [part for part in (text("prompt"), text("query")) if part]
    prompt = "\n\n".join(part for part in (before, "\n".join(after)) if part)
    messages.append(Message("user", prompt))
    response = layout.column("response")
    if response is not None and (response in record or not layout.prompts):
        _refuse_missing(response, record)
        value = _answer(record.get(response), several=layout.schema == "squad")
        answer = as_text(value, f"column {response!r}")
        if not answer.strip() and not layout.prompts:
            raise RowError(f"the answer is empty (column {response!r})")
        messages.append(Message("assistant", answer))
    return messages


def _answer(value: Any, several: bool) -> Any:
    """Return the first of several right answers, as SQuAD keeps them."""
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value = value["text"]  # {"text": [...], "answer_start": [...]}
    if not isinstance(value, list):
        return value
    if len(value) > 1 and not several and not isinstance(value[0], dict):
        raise RowError(f"the answer is a list of {len(value)}: that is a preference, not an answer")
    first = value[0] if value else ""
    return first.get("text") if isinstance(first, dict) else first


def _history(value: Any) -> list[Message]:
    """Read earlier turns: pairs of question and answer."""
    value = parse_json(value, "history")
    if not value:
        return []
    if not isinstance(value, list):
        raise RowError(f"history is {type(value).__name__}, not a list of pairs")
    messages = []
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"history holds {str(pair)[:60]!r}, not a pair of question and answer")
        messages.append(Message("user", as_text(pair[0], "history")))
        messages.append(Message("assistant", as_text(pair[1], "history")))
    return messages


def _listed(record: dict[str, Any], layout: Layout, remarks: Remarks) -> list[Message]:
    """Read a list of messages, and a system message in a column of its own."""
    column = layout.column("messages")
    value = parse_json(value_of(record, layout, "messages"), f"column {column!r}")
    if value is None and column is not None:
        _refuse_missing(column, record)
    if not isinstance(value, list):
        raise RowError(f"column {column!r} holds {type(value).__name__}, not a list of messages")
    return with_system(read_messages(value, layout, remarks), record, layout)


def _listed_in_two(record: dict[str, Any], layout: Layout, remarks: Remarks) -> list[Message]:
    """Read a list of messages that ask, and one of those that answer (TRL's prompt, completion)."""
    asked, answered = (value_of(record, layout, name) for name in ("prompt", "response"))
    if not isinstance(answered, list) and not (layout.prompts and answered is None):
        raise RowError(
            f"column {layout.column('prompt')!r} is a list of messages, column "
            f"{layout.column('response')!r} is none"
        )
    return with_system(read_messages([*asked, *(answered or [])], layout, remarks), record, layout)


def with_system(messages: list[Message], record: dict[str, Any], layout: Layout) -> list[Message]:
    """Put the system message of a column of its own first; leave out an empty one."""
    system = as_text(value_of(record, layout, "system"), "the system column")
    if system.strip() and (not messages or messages[0].role != "system"):
        messages.insert(0, Message("system", system))
    if messages and messages[0].role == "system" and not messages[0].content.strip():
        del messages[0]
    return messages
