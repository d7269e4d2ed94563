"""Conversations: what every chat format becomes, and what templates and training read."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        role: who speaks; ``tool`` is the result of a call.
        content: its text; may be empty when there are calls.
        tool_calls: of an assistant: ``{"name": str, "arguments": object}`` each.
        reasoning: of an assistant: thoughts before the answer, for templates that show them.
        weight: of an assistant: factor of the loss of its tokens; 0 = context only.
    """

    role: Role
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    reasoning: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class Conversation:
    """Messages in order: perhaps a system message, then turns, the last an assistant's.

    Attributes:
        messages: in the order they were spoken.
        tools: JSON schemas of the functions an assistant may call, in OpenAI's form without the
            ``{"type": "function"}`` around them.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()

    def as_chat(self) -> list[dict[str, Any]]:
        """Return the messages as ``apply_chat_template`` reads them.

        Calls are numbered, and results name theirs in order: some templates (Mistral's) refuse
        calls without an id of nine letters and digits.
        """
        chat = [_as_chat(message) for message in self.messages]
        ids = (f"call{number:05d}" for number in count())
        waiting: list[str] = []
        for message in chat:
            for call in message.get("tool_calls", ()):
                call["id"] = next(ids)
                waiting.append(call["id"])
            if message["role"] == "tool" and waiting:
                message["tool_call_id"] = waiting.pop(0)
        return chat

    def tool_schemas(self) -> list[dict[str, Any]] | None:
        """Return the tools as ``apply_chat_template`` reads them, None without any."""
        return [{"type": "function", "function": tool} for tool in self.tools] or None


def _as_chat(message: Message) -> dict[str, Any]:
    chat: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        chat["tool_calls"] = [{"type": "function", "function": c} for c in message.tool_calls]
    if message.reasoning:
        chat["reasoning_content"] = message.reasoning
    return chat
