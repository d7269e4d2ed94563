"""Conversations of a chunk, encoded into its draft."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from trainer.data.chats.chat_encoder import ChatEncoder, EncodedRow, TooLongError
from trainer.data.chats.chat_rows import read_conversation
from trainer.data.chats.conversation import Conversation
from trainer.data.chats.layouts import Layout
from trainer.data.prepared.drafts import WEIGHTS, Draft
from trainer.data.prepared.store import hash_text
from trainer.data.reading.raw import Row, RowError
from trainer.data.reading.records import Reject, RejectLog, excerpt, parse_record
from trainer.data.reading.remarks import Remarks

REPORT_EVERY_ROWS = 256


def add_conversations(
    draft: Draft,
    rows: Iterator[Row],
    path: Path,
    layout: Layout,
    encoder: ChatEncoder,
    rejects: RejectLog,
    report: Callable[[int, int], None],
) -> None:
    """Encode the conversations of ``rows``.

    Args:
        draft: takes them.
        rows: raw rows of ``path``.
        path: the file.
        layout: how it is read.
        encoder: for these sources.
        rejects: counts every row.
        report: hears of bytes read and conversations made since its last call.

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
) -> bool:
    """Add one conversation, or say why not; tell whether it was added."""
    noticed = Remarks()
    try:
        conversation = read_conversation(parse_record(row.value), layout, noticed)
        encoded = encoder.encode(conversation)
    except TooLongError as error:
        # A good row all the same: it is named, but does not count as a bad one.
        sample = excerpt(row.value if isinstance(row.value, bytes) else repr(row.value))
        draft.left_out.append(Reject(str(path), row.number, str(error), sample))
        draft.add(row_lengths=error.num_tokens, row_hashes=_hash_all(conversation))
        draft.chats["long"] += 1
        rejects.accept()
        return False
    except RecursionError:
        rejects.reject_row(row, path, "nested too deeply")
        return False
    except RowError as error:
        rejects.reject_row(row, path, str(error))
        return False
    rejects.accept()
    draft.remarks.merge(noticed.counts)
    _add_encoded(draft, conversation, encoded)
    return True


def _add_encoded(draft: Draft, conversation: Conversation, encoded: EncodedRow) -> None:
    asked = next((m.content for m in conversation.messages if m.role == "user"), "")
    # By the first question: the same one is never trained on and held out.
    side = hash_text(asked.encode())
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
    draft.add(row_lengths=encoded.num_tokens, row_hashes=_hash_all(conversation))
    draft.chats["kept"] += 1
    draft.chats["turns"] += encoded.num_turns
    draft.chats["turns_cut"] += encoded.num_turns_cut
    draft.chats["cut"] += encoded.num_turns_cut > 0
    draft.chats["spells_control"] += encoded.spells_control
    draft.chats["hides_thoughts"] += encoded.hides_thoughts


def _hash_all(conversation: Conversation) -> int:
    content = json.dumps([conversation.as_chat(), conversation.tools], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")
