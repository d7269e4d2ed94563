"""Lists of messages: who speaks, what is said, which functions are called."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from trainer.data.chats.conversation import Message, Role
from trainer.data.chats.layouts import Layout
from trainer.data.chats.tool_calls import ResultOrder, parse_json, read_calls
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


def read_messages(value: list[Any], layout: Layout, remarks: Remarks) -> list[Message]:
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
