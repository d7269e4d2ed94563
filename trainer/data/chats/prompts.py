"""From one record of a file to a prompt, and to the answer that the file gives to it."""

from __future__ import annotations

from typing import Any

from trainer.data.chats.chat_rows import checked_conversation, spoken_messages
from trainer.data.chats.conversation import Conversation
from trainer.data.chats.layouts import Layout
from trainer.data.chats.preferences import best_messages
from trainer.data.reading.remarks import Remarks


def read_prompt(
    record: dict[str, Any], layout: Layout, remarks: Remarks | None = None
) -> tuple[Conversation, str | None]:
    """Return the conversation of one record up to its last answer, and that answer.

    Of preferences the answer is the best one; a lone bad answer is none.

    Args:
        record: a JSON object, or a row of a table by column.
        layout: where things are, with ``prompts`` set.
        remarks: counts what was noticed about an accepted record.

    Raises:
        RowError: with the reason there is no prompt.
    """
    noticed = Remarks()
    read = best_messages if layout.preference else spoken_messages
    messages = read(record, layout, noticed)
    prompt = checked_conversation(messages, record, layout, noticed)
    if remarks is not None:
        remarks.merge(noticed.counts)
    last = messages[-1]
    answer = last.content if last.role == "assistant" else ""
    return prompt, answer if answer.strip() else None
