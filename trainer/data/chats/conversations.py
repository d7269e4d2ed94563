"""From a source's files to conversations; what cannot be one is rejected with its reason."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.config import SourceConfig
from trainer.data.chats.chat_rows import read_conversation
from trainer.data.chats.conversation import Conversation
from trainer.data.chats.layout_search import find_layout
from trainer.data.chats.layouts import Layout
from trainer.data.chats.prompts import read_prompt
from trainer.data.reading.files import list_files, naming_the_file, open_seekable
from trainer.data.reading.nesting import unnest
from trainer.data.reading.raw import Row, RowError
from trainer.data.reading.readers import row_text
from trainer.data.reading.records import JsonLine, RejectLog, parse_record
from trainer.data.reading.remarks import Remarks
from trainer.data.reading.rows import iterate_rows
from trainer.data.reading.spreadsheets import describe_sheet
from trainer.errors import DataError

__all__ = [
    "Example",
    "decode_conversation",
    "describe_file",
    "find_layout",
    "read_conversations",
    "walk_conversations",
]


@dataclass(frozen=True)
class Example:
    """One conversation and where it came from; ``row`` is the 1-based line or record."""

    conversation: Conversation
    source: str
    file: str
    row: int


def read_conversations(
    source: SourceConfig,
    source_name: str,
    rejects: RejectLog,
    remarks: Remarks | None = None,
    prompts: bool = False,
) -> Iterator[Example]:
    """Yield every conversation of ``source`` in file order.

    Args:
        source: files and how to read them.
        source_name: goes into ``Example.source``.
        rejects: counts every row; closed at the end.
        remarks: counts what was noticed, duplicates too.
        prompts: conversations end before the answer, which need not be there.

    Raises:
        DataError: a file is missing, empty, unreadable or not recognised, or more rows were
            rejected than ``rejects`` allows.
    """
    seen: set[bytes] = set()
    for path in list_files(source):
        layout = find_layout(path, source, "prompts" if prompts else "conversations")
        for row in walk_conversations(path, source, layout):
            conversation = decode_conversation(row, path, source, layout, rejects, remarks)
            if conversation is None:
                continue
            if remarks is not None and (key := _hash(conversation)) in seen:
                remarks.note("duplicates")
            elif remarks is not None:
                seen.add(key)
            yield Example(conversation, source_name, str(path), row.number)
    rejects.check_share()
    rejects.close()


def _hash(conversation: Conversation) -> bytes:
    content = [conversation.as_chat(), conversation.tools]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).digest()


def walk_conversations(path: Path, source: SourceConfig, layout: Layout) -> Iterator[Row]:
    """Yield the raw rows of one file, one for each conversation.

    A row of a SQuAD file or a seed task is numbered by its question.

    Raises:
        DataError: the file is unreadable or has no row.
    """
    wanted = [name for _, name in layout.columns]
    encoding = layout.encoding or "utf-8"
    rows = iterate_rows(path, layout.format, None, encoding, layout.sheet, wanted)
    if layout.format == "jsonl":
        rows = (
            row._replace(value=JsonLine(row.value)) if isinstance(row.value, bytes) else row
            for row in rows
        )
    elif layout.format == "lines":
        rows = map(_question, rows)
    if layout.nested:
        rows = _unnest(rows, layout.nested)
    is_empty = True
    with naming_the_file(path):
        for row in islice(rows, layout.max_rows):
            is_empty = False
            yield row
    if is_empty:
        raise DataError(f"{path} holds no row; remove it from the source or restore it")


def _question(row: Row) -> Row:
    """Return a line of text as a row with that text."""
    try:
        value: dict[str, Any] | RowError = {"text": row_text(row.value, [])}
    except RowError as error:
        value = error
    return row._replace(value=value)


def _unnest(rows: Iterator[Row], nested: str) -> Iterator[Row]:
    number = 0
    for row in rows:
        values: list[dict[str, Any] | RowError]
        try:
            values = list(unnest(parse_record(row.value), nested))
        except RowError as error:
            values = [error]
        for value in values:
            number += 1
            yield Row(number, row.num_bytes // len(values), value)


def decode_conversation(
    row: Row,
    path: Path,
    source: SourceConfig,
    layout: Layout,
    rejects: RejectLog,
    remarks: Remarks | None = None,
) -> Conversation | None:
    """Return the conversation of a raw row, or None after rejecting it."""
    try:
        record = parse_record(row.value)
        if layout.prompts:
            conversation, _ = read_prompt(record, layout, remarks)
        else:
            conversation = read_conversation(record, layout, remarks)
    except RecursionError:
        rejects.reject_row(row, path, "nested too deeply")
        return None
    except RowError as error:
        rejects.reject_row(row, path, str(error))
        return None
    rejects.accept()
    return conversation


def describe_file(path: Path, layout: Layout) -> list[str]:
    """Return what a user should check of how a file is read: layout, encoding, sheet, merges."""
    lines = [layout.describe()]
    if layout.format in ("xlsx", "xls"):
        with open_seekable(path) as file:
            wanted = [name for _, name in layout.columns]
            lines += describe_sheet(file, path, layout.format, layout.sheet, wanted)
    return lines
