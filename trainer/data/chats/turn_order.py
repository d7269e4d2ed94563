"""The order of turns: what a conversation must look like to be trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from trainer.data.chats.conversation import Message
from trainer.data.reading.raw import RowError
from trainer.data.reading.remarks import Remarks

PLACEHOLDER = re.compile(r"\{\{\s*[^\W\d][\w.]*\s*\}\}")


def arrange(messages: list[Message], remarks: Remarks, prompts: bool = False) -> list[Message]:
    """Return checked messages that end with an assistant's, or with a prompt for one.

    Turns after the last answer are left out and remarked, as are an assistant's before the first
    question: a greeting that no prompt of ours would bring forth.

    Args:
        messages: as they were read.
        remarks: counts what was noticed.
        prompts: leave the last answer out instead, for generation.

    Raises:
        RowError: with the reason they are no conversation.
    """
    if not messages:
        raise RowError("no messages")
    messages = _begin_with_question(_join_calls(messages), remarks)
    _check_order(messages)
    messages = _end_with_prompt(messages) if prompts else _end_with_answer(messages, remarks)
    for number, message in enumerate(messages, 1):
        _check_content(message, number)
    if not prompts and not any(m.weight for m in messages if m.role == "assistant"):
        raise RowError("every answer has the loss weight 0: there is nothing to train")
    _remark(messages, remarks)
    return messages


def _join_calls(messages: list[Message]) -> list[Message]:
    """Join a call to the assistant's words, or calls, right before it: they are one turn."""
    joined: list[Message] = []
    for message in messages:
        last = joined[-1] if joined else None
        is_mere_call = bool(message.tool_calls) and not message.content
        if last is not None and is_mere_call and last.role == "assistant":
            calls = last.tool_calls + message.tool_calls
            reasoning = last.reasoning + message.reasoning
            joined[-1] = replace(last, tool_calls=calls, reasoning=reasoning)
        else:
            joined.append(message)
    return joined


def _begin_with_question(messages: list[Message], remarks: Remarks) -> list[Message]:
    start = 1 if messages[0].role == "system" else 0
    is_greeting = len(messages) > start and messages[start].role == "assistant"
    if not is_greeting or not any(message.role == "user" for message in messages):
        return messages
    remarks.note("greetings")
    return [*messages[:start], *messages[start + 1 :]]


def _check_order(messages: list[Message]) -> None:
    """Refuse an order in which no template could render the messages."""
    previous, num_open_calls = "system", 0
    for number, message in enumerate(messages, 1):
        role, both = message.role, f"messages {number - 1} and {number}"
        if role == "system":
            if number > 1:
                raise RowError(f"message {number} is a system message; only the first may be one")
            continue
        if role == "tool" and not num_open_calls:
            raise RowError(f"message {number} is a tool result without a call before it")
        if role == previous and role != "tool":
            raise RowError(f"two {role} turns in a row ({both})")
        if role == "user" and previous == "assistant" and num_open_calls:
            raise RowError(f"{both}: a user turn where a tool result must come")
        if role == "user" and previous == "tool":
            raise RowError(f"{both}: a user turn where the answer to a tool result must come")
        num_open_calls = num_open_calls - 1 if role == "tool" else len(message.tool_calls)
        previous = role


def _end_with_answer(messages: list[Message], remarks: Remarks) -> list[Message]:
    end = len(messages)
    while end and messages[end - 1].role != "assistant":
        end -= 1
    if not end:
        raise RowError("no answer: no message is an assistant's")
    if not any(message.role == "user" for message in messages):
        raise RowError("no question: no message is a user's")
    if end < len(messages):
        remarks.note("trailing_turns")
    return messages[:end]


def _end_with_prompt(messages: list[Message]) -> list[Message]:
    messages = messages[:-1] if messages[-1].role == "assistant" else messages
    if not messages or messages[-1].role not in ("user", "tool"):
        raise RowError("no prompt: no message is a user's")
    return messages


def _check_content(message: Message, number: int) -> None:
    if message.content and not message.content.isspace():
        return
    if message.role == "user":
        raise RowError(f"message {number}, the user's, is empty")
    if message.role == "assistant" and not message.tool_calls:
        raise RowError(f"the answer in message {number} is empty")


def _remark(messages: Iterable[Message], remarks: Remarks) -> None:
    texts = [message.content for message in messages]
    answers = [message.content for message in messages if message.role == "assistant"]
    if any("{{" in text and PLACEHOLDER.search(text) for text in texts):
        remarks.note("placeholders")
    if any("\ufffd" in text for text in texts):
        remarks.note("replacement_characters")
    if any(answer != answer.strip() for answer in answers):
        remarks.note("outer_space")
