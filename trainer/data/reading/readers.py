"""From a source's files to documents; what cannot be one is rejected with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config import SourceConfig
from trainer.data.reading.columns import missing_column
from trainer.data.reading.files import detect_encoding, detect_format, list_files, naming_the_file
from trainer.data.reading.raw import BadCell, Row, RowError
from trainer.data.reading.records import Document, JsonLine, RejectLog, decode_utf8, parse_record
from trainer.data.reading.rows import iterate_rows
from trainer.errors import DataError

__all__ = ["list_files", "read_documents", "read_file"]


class MissingColumnError(RowError):
    """A record without one of the text columns."""


def read_documents(
    source: SourceConfig, source_name: str, rejects: RejectLog
) -> Iterator[Document]:
    """Yield every document of ``source`` in file order.

    Args:
        source: files, format and text columns.
        source_name: goes into ``Document.source``.
        rejects: counts every row; closed at the end.

    Raises:
        DataError: a file is missing, empty or unreadable, the format or a column is not there, or
            more rows were rejected than ``rejects`` allows.
    """
    for path in list_files(source):
        yield from read_file(path, source, source_name, rejects)
    rejects.check_share()
    rejects.close()


def read_file(
    path: Path, source: SourceConfig, source_name: str, rejects: RejectLog
) -> Iterator[Document]:
    """Yield the documents of one file; raises as ``read_documents`` does."""
    for row in walk_file(path, source):
        text = decode_row(row, path, source, rejects)
        if text is not None:
            yield Document(text, source_name, str(path), row.number)


def walk_file(path: Path, source: SourceConfig) -> Iterator[Row]:
    """Yield the raw rows of one file.

    Raises:
        DataError: the file is unreadable or has no row, or its first record lacks a text column.
    """
    format_name = detect_format(path, source.format, source.encoding)
    encoding = detect_encoding(path, source.encoding)
    first = True
    with naming_the_file(path):
        for row in iterate_rows(path, format_name, source.text_columns, encoding, source.sheet):
            if format_name == "jsonl" and isinstance(row.value, bytes):
                row = row._replace(value=JsonLine(row.value))
            if first:
                _refuse_missing_columns(row, path, source.text_columns)
            first = False
            yield row
    if first:
        raise DataError(f"{path} holds no row; remove it from the source or restore it")


def decode_row(row: Row, path: Path, source: SourceConfig, rejects: RejectLog) -> str | None:
    """Return the text of a raw row, or None after rejecting it."""
    try:
        text = row_text(row.value, source.text_columns)
    except RowError as error:
        rejects.reject_row(row, path, str(error))
        return None
    rejects.accept()
    return text


def row_text(value: bytes | dict[str, Any] | RowError, columns: list[str]) -> str:
    """Return the clean text of a raw row.

    Raises:
        RowError: with the reason it has none.
    """
    if isinstance(value, RowError):
        raise value
    if isinstance(value, JsonLine):
        value = parse_record(value)
    if isinstance(value, bytes):
        text = decode_utf8(value)
    else:
        parts = [_column_text(value, name) for name in columns]
        text = "\n".join(part for part in parts if part) if len(parts) > 1 else parts[0]
    return _check_text(text.rstrip("\r\n") if isinstance(value, bytes) else text)


def _column_text(record: dict[str, Any], name: str) -> str:
    if name not in record:
        raise MissingColumnError(f"no column {name!r}; the columns are {', '.join(record)}")
    value = record[name]
    if value is None:
        return ""
    if isinstance(value, bytes):
        return decode_utf8(value)
    if isinstance(value, BadCell):
        raise RowError(value.reason)
    if not isinstance(value, str):
        raise RowError(f"column {name!r} holds {type(value).__name__}, not text")
    return value


def _check_text(text: str) -> str:
    """Refuse texts that no tokenizer should see."""
    if not text or text.isspace():
        raise RowError("empty text")
    if "\x00" in text:
        raise RowError(f"NUL character at offset {text.index(chr(0))}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # Bytes that were no UTF-8 in a CSV or JSON list arrive as U+DC80..U+DCFF.
        reason = "invalid UTF-8 or lone surrogate" if 0xDC80 <= code <= 0xDCFF else "lone surrogate"
        raise RowError(f"{reason} U+{code:04X} at offset {error.start}") from error
    return text


def _refuse_missing_columns(row: Row, path: Path, columns: list[str]) -> None:
    """Raise when the file's first record lacks a column: a wrong setting, not a bad row."""
    try:
        row_text(row.value, columns)
    except MissingColumnError as error:
        record = parse_record(row.value)
        name = next(name for name in columns if name not in record)
        raise DataError(missing_column(path, name, list(record))) from error
    except RowError:
        return  # counted when it is read
