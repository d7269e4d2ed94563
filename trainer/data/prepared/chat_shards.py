"""Conversations, preferences or prompts of a chunk, encoded into its draft."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.chats.chat_encoder import ChatEncoder, EncodedRow, TooLongError
from trainer.data.chats.chat_rows import read_conversation
from trainer.data.chats.conversation import Conversation
from trainer.data.chats.layouts import Layout
from trainer.data.chats.pair_encoder import PairEncoder
from trainer.data.chats.prompt_encoder import PromptEncoder
from trainer.data.prepared.drafts import WEIGHTS, Draft
from trainer.data.prepared.preference_shards import (
    add_preferences,
    add_prompt,
    hash_chat,
    hash_question,
)
from trainer.data.reading.raw import Row, RowError, printable
from trainer.data.reading.records import Reject, RejectLog, excerpt, parse_record
from trainer.data.reading.remarks import Remarks

REPORT_EVERY_ROWS = 256


def add_chats(
    draft: Draft,
    rows: Iterator[Row],
    path: Path,
    layout: Layout,
    encoder: ChatEncoder,
    rejects: RejectLog,
    report: Callable[[int, int], None],
) -> None:
    """Encode the conversations, preferences or prompts of ``rows``.

    Args:
        draft: takes them.
        rows: raw rows of ``path``.
        path: the file.
        layout: how it is read.
        encoder: for these sources.
        rejects: counts every row.
        report: hears of bytes read and documents made since its last call.

    Raises:
        DataError: too many rejected rows.
    """
    num_bytes = num_done = 0
    for count, row in enumerate(rows, start=1):
        num_bytes += row.num_bytes
        num_done += _add_row(draft, row, path, layout, encoder, rejects)
        if count % REPORT_EVERY_ROWS == 0:
            report(num_bytes, num_done)
            num_bytes = num_done = 0
    report(num_bytes, num_done)


def _add_row(
    draft: Draft, row: Row, path: Path, layout: Layout, encoder: ChatEncoder, rejects: RejectLog
) -> int:
    """Add what one row holds, or say why not; return how many documents were added."""

    def leave_out(reason: str) -> None:
        # Of a good row all the same: it is named, but does not count as a bad one.
        sample = excerpt(row.value if isinstance(row.value, bytes) else repr(row.value))
        draft.left_out.append(Reject(str(path), row.number, printable(reason), sample))

    noticed = Remarks()
    try:
        record = parse_record(row.value)
        if isinstance(encoder, PairEncoder):
            num_added = add_preferences(draft, record, layout, encoder, noticed, leave_out)
        elif isinstance(encoder, PromptEncoder):
            num_added = add_prompt(draft, record, layout, encoder, noticed, leave_out)
        else:
            num_added = _add_conversation(draft, record, layout, encoder, noticed, leave_out)
    except RecursionError:
        rejects.reject_row(row, path, "nested too deeply")
        return 0
    except RowError as error:
        rejects.reject_row(row, path, str(error))
        return 0
    rejects.accept()
    if num_added:
        draft.remarks.merge(noticed.counts)
    return num_added


def _add_conversation(
    draft: Draft,
    record: dict[str, Any],
    layout: Layout,
    encoder: ChatEncoder,
    remarks: Remarks,
    leave_out: Callable[[str], None],
) -> int:
    conversation = read_conversation(record, layout, remarks)
    try:
        encoded = encoder.encode(conversation)
    except TooLongError as error:
        leave_out(str(error))
        draft.add(row_lengths=error.num_tokens, row_hashes=hash_chat(conversation))
        draft.chats["long"] += 1
        return 0
    _add_encoded(draft, conversation, encoded)
    return 1


def _add_encoded(draft: Draft, conversation: Conversation, encoded: EncodedRow) -> None:
    side = hash_question(conversation)
    for chat in encoded.chats:
        draft.tokens.append(chat.input_ids.tobytes())
        draft.weights.append(chat.weights.astype(WEIGHTS).tobytes())
        draft.add(
            num_tokens=len(chat.input_ids),
            num_chars=chat.num_chars,
            num_bytes=chat.num_bytes,
            text_hashes=side,
        )
        draft.chats["trained_tokens"] += int(np.count_nonzero(chat.weights))
    draft.add(row_lengths=encoded.num_tokens, row_hashes=hash_chat(conversation))
    draft.chats["kept"] += 1
    draft.chats["turns"] += encoded.num_turns
    draft.chats["turns_cut"] += encoded.num_turns_cut
    draft.chats["cut"] += encoded.num_turns_cut > 0
    draft.chats["spells_control"] += encoded.spells_control
    draft.chats["hides_thoughts"] += encoded.hides_thoughts
