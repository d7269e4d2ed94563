"""From one record of a file to one conversation."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from trainer.data.chats.conversation import Conversation, Message, Role
from trainer.data.chats.layouts import Layout
from trainer.data.chats.tool_calls import ResultOrder, parse_json, read_calls, read_tools
from trainer.data.chats.turn_order import arrange
from trainer.data.reading.columns import guess_columns
from trainer.data.reading.raw import BadCell, RowError
from trainer.data.reading.remarks import Remarks

CALL = "call"  # a speaker of its own in ShareGPT files: the assistant calling functions
ROLES: dict[str, str] = {
    **dict.fromkeys(("system", "developer", "系統", "系统"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "使用者", "用戶", "用户"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "助理", "助手"), "assistant"),
    **dict.fromkeys(("ai", "bard", "bing"), "assistant"),
    **dict.fromkeys(("function_call", "function-call", "tool_call", "tool_calls"), CALL),
    **dict.fromkeys(("tool", "observation", "function", "ipython"), "tool"),
    **dict.fromkeys(("function_response", "tool_response", "tool_result"), "tool"),
}
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("reasoning", "thinking")
ROLE_KEYS = {"role", "from"}
MAX_WEIGHT = 1000
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
    for column in MEDIA_COLUMNS:
        if isinstance(record.get(column), list) and record[column]:
            raise RowError(f"column {column!r} is filled: only text can be trained")
    noticed = Remarks()
    if layout.keeps_messages:
        messages = _listed(record, layout, noticed)
    elif isinstance(_value(record, layout, "prompt"), list):
        messages = _listed_in_two(record, layout, noticed)
    else:
        messages = _asked(record, layout, noticed)
    tools = read_tools(_value(record, layout, "tools"), layout.drop_nulls)
    messages = arrange(messages, noticed, layout.prompts)
    for calls in (tools, *(message.tool_calls for message in messages if message.tool_calls)):
        as_text(json.dumps(calls, ensure_ascii=False), "tools")
    read = dict(layout.columns).values()
    if any(record.get(name) and name not in read for name in _usual(layout)):
        noticed.note("unread_columns")
    declared = {tool["name"] for tool in tools}
    if any(call["name"] not in declared for m in messages for call in m.tool_calls):
        noticed.note("undeclared_tools")
    if remarks is not None:
        remarks.merge(noticed.counts)
    return Conversation(tuple(messages), tools)


def _usual(layout: Layout) -> tuple[str, ...]:
    """Return columns that most likely belong to a conversation where they occur."""
    return ("system", "tools") if layout.keeps_messages else ("input", "system", "history")


def _value(record: dict[str, Any], layout: Layout, name: str) -> Any:
    column = layout.column(name)
    return None if column is None else record.get(column)


def _refuse_missing(column: str, record: dict[str, Any]) -> None:
    if column not in record:
        raise RowError(f"no column {column!r}; the row has {', '.join(map(str, record))[:200]}")


def _asked(record: dict[str, Any], layout: Layout, remarks: Remarks) -> list[Message]:
    """Read a question, what belongs to it, and its answer."""

    def text(name: str) -> str:
        return as_text(_value(record, layout, name), f"column {layout.column(name)!r}")

    messages = [Message("system", text("system"))] if text("system").strip() else []
    messages += _history(_value(record, layout, "history"))
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
    value = parse_json(_value(record, layout, "messages"), f"column {column!r}")
    if value is None and column is not None:
        _refuse_missing(column, record)
    if not isinstance(value, list):
        raise RowError(f"column {column!r} holds {type(value).__name__}, not a list of messages")
    return _with_system(_spoken(value, layout, remarks), record, layout)


def _listed_in_two(record: dict[str, Any], layout: Layout, remarks: Remarks) -> list[Message]:
    """Read a list of messages that ask, and one of those that answer (TRL's prompt, completion)."""
    asked, answered = (_value(record, layout, name) for name in ("prompt", "response"))
    if not isinstance(answered, list) and not (layout.prompts and answered is None):
        raise RowError(
            f"column {layout.column('prompt')!r} is a list of messages, column "
            f"{layout.column('response')!r} is none"
        )
    return _with_system(_spoken([*asked, *(answered or [])], layout, remarks), record, layout)


def _spoken(value: list[Any], layout: Layout, remarks: Remarks) -> list[Message]:
    """Read messages, each by its own keys."""
    messages, weighted = [], False
    results = ResultOrder()
    for number, spoken in enumerate(_split_pairs(value), 1):
        if not isinstance(spoken, dict):
            raise RowError(f"message {number} is {type(spoken).__name__}, not an object")
        message = _message(spoken, f"message {number}", layout)
        results.add(spoken, number)
        if message.role != "assistant" and _weight(spoken, f"message {number}", 0.0):
            weighted = weighted or message.role != "system"
        messages.append(message)
    if weighted:
        remarks.note("user_weights")
    return results.sort(messages)


def _with_system(messages: list[Message], record: dict[str, Any], layout: Layout) -> list[Message]:
    """Put the system message of a column of its own first; leave out an empty one."""
    system = as_text(_value(record, layout, "system"), "the system column")
    if system.strip() and (not messages or messages[0].role != "system"):
        messages.insert(0, Message("system", system))
    if messages and messages[0].role == "system" and not messages[0].content.strip():
        del messages[0]
    return messages


def _split_pairs(listed: list[Any]) -> Iterator[Any]:
    """Yield messages; an object of question and answer, by any of their names, is two.

    Bare texts are the user's and the assistant's in turn.
    """
    if listed and all(isinstance(spoken, str) for spoken in listed):
        for number, text in enumerate(listed):
            yield {"role": "assistant" if number % 2 else "user", "content": text}
        return
    for spoken in listed:
        pair: dict[str, str] = {}
        if isinstance(spoken, dict) and not ROLE_KEYS & set(spoken):
            pair = guess_columns(map(str, spoken))
        if {"prompt", "response"} <= set(pair):
            yield {"role": "user", "content": spoken[pair["prompt"]]}
            yield {"role": "assistant", "content": spoken[pair["response"]]}
        else:
            yield spoken


def _message(spoken: dict[str, Any], where: str, layout: Layout) -> Message:
    role = _role(spoken, where, layout)
    keys = [layout.content_key] if layout.content_key else ["content", "value", "text"]
    content: Any = next((spoken[key] for key in keys if spoken.get(key) is not None), None)
    calls: list[Any] = []
    if role == CALL:
        return Message(
            "assistant",
            "",
            read_calls(content, where, layout.drop_nulls),
            weight=_weight(spoken, where, 1.0),
        )
    text, reasoning = _content(content, where, calls)
    for key in ("tool_calls", "function_call"):
        found = parse_json(spoken.get(key), f"{where}: {key}")
        calls += found if isinstance(found, list) else [found] if found else []
    if calls and role != "assistant":
        raise RowError(f"{where}: a {role} message calls functions; only an assistant may")
    if role != "assistant":
        return Message(_as_role(role), text)
    for key in ("reasoning_content", "reasoning", "thinking"):
        reasoning = reasoning or as_text(spoken.get(key), f"{where}: {key}")
    read = read_calls(calls, where, layout.drop_nulls)
    return Message("assistant", text, read, reasoning, _weight(spoken, where, 1.0))


def _role(spoken: dict[str, Any], where: str, layout: Layout) -> str:
    keys = [layout.role_key] if layout.role_key else ["role", "from"]
    name = next((spoken[key] for key in keys if spoken.get(key) is not None), None)
    if name is None:
        raise RowError(f"{where} has no {' or '.join(keys)}; its keys are {', '.join(spoken)}")
    role = dict(layout.roles).get(str(name)) or ROLES.get(str(name).strip().lower())
    if role is None:
        raise RowError(f"{where}: unknown role {str(name)[:40]!r}")
    return role


def _as_role(role: str) -> Role:
    roles: dict[str, Role] = {"system": "system", "user": "user", "tool": "tool"}
    return roles[role]


def _content(content: Any, where: str, calls: list[Any]) -> tuple[str, str]:
    """Return text and reasoning of a message; calls among its parts go to ``calls``."""
    if not isinstance(content, list):
        if isinstance(content, dict):
            return as_text(content.get("text"), where), ""
        return as_text(content, where), ""
    texts, thoughts = [], []
    for part in content:
        kind = str(part.get("type") or "text") if isinstance(part, dict) else "text"
        value: Any = part
        if isinstance(part, dict):
            keys = (kind, "value", "text", "content")
            value = next((part[k] for k in keys if k != "type" and part.get(k) is not None), None)
        if kind in TEXT_PARTS:
            texts.append(as_text(value, where))
        elif kind in REASONING_PARTS:
            thoughts.append(as_text(value, where))
        elif kind in ("tool_call", "tool_use", "function_call"):
            found = parse_json(value if value is not None else part, f"{where}: a tool call")
            calls += found if isinstance(found, list) else [found]
        elif kind.startswith(("image", "video", "audio", "input_audio", "input_image")):
            raise RowError(f"{where} holds {kind}: only text can be trained")
        else:
            raise RowError(f"{where} holds a part of the unknown type {kind[:40]!r}")
    return "".join(texts), "".join(thoughts)


def _weight(spoken: dict[str, Any], where: str, default: float) -> float:
    value = next((spoken[k] for k in ("loss_weight", "weight") if spoken.get(k) is not None), None)
    if value is None:
        return default
    if isinstance(value, (int, float)) and 0 <= value <= MAX_WEIGHT:
        return float(value)
    raise RowError(f"{where}: loss weight {str(value)[:40]!r} is no number from 0 to {MAX_WEIGHT}")


def as_text(value: Any, where: str) -> str:
    """Return a cell or a message's content as text; nothing, and not-a-number, are empty.

    Raises:
        RowError: it is no text, or holds characters that no tokenizer should see.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        raise RowError(f"{where} holds bytes, not text")
    if isinstance(value, BadCell):
        raise RowError(value.reason)
    if isinstance(value, (list, dict)):
        raise RowError(f"{where} holds {type(value).__name__}, not text")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    if "\x00" in text:
        raise RowError(f"{where}: NUL character at offset {text.index(chr(0))}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # how bytes that do not decode arrive
            reason = f"byte 0x{code - 0xDC00:02x} is not of the file's encoding"
        else:
            reason = f"lone surrogate U+{code:04X}"
        raise RowError(f"{where}: {reason} at offset {error.start}") from error
    return text
