"""Raw rows of every format: cheap to walk over, decoded only when wanted.

Walking and decoding are apart so that a process that prepares every n-th chunk of a file can pass
over the others at the speed of the disk.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO

from trainer.data.reading.columns import name_columns
from trainer.data.reading.encodings import keep_invalid
from trainer.data.reading.files import BINARY_FORMATS, open_bytes, open_seekable
from trainer.data.reading.raw import Row, RowError
from trainer.data.reading.spreadsheets import iterate_sheet
from trainer.data.reading.tables import iterate_table
from trainer.errors import DataError

MAX_TXT_BYTES = 1 << 28  # a "document" above 256 MiB is a corpus, to be read as lines
READ_CHARS = 1 << 20


def iterate_rows(
    path: Path,
    format_name: str,
    columns: Sequence[str] | None,
    encoding: str = "utf-8",
    sheet: str | None = None,
    wanted: Sequence[str] = (),
) -> Iterator[Row]:
    """Yield the raw rows of ``path``; blank lines are no rows.

    Args:
        path: file to read.
        format_name: one of ``FORMATS``.
        columns: text columns to read from parquet and Arrow; None = all, with nested values.
        encoding: of a text format.
        sheet: of a workbook; None = the first with rows.
        wanted: names that a workbook's header is known to have.
    """
    if format_name in BINARY_FORMATS:
        with open_seekable(path) as file:
            if format_name in ("xlsx", "xls"):
                yield from iterate_sheet(file, path, format_name, sheet, wanted or columns or ())
            else:
                yield from iterate_table(file, path, format_name, columns)
        return
    walk: dict[str, Callable[[IO[bytes], Path], Iterator[Row]]] = {
        "txt": _whole_file,
        "lines": _lines,
        "jsonl": _lines,
        "json": _json_values,
        "csv": _csv_rows,
        "tsv": _tsv_rows,
    }
    with open_bytes(path, encoding) as stream:
        yield from walk[format_name](stream, path)


def _whole_file(stream: IO[bytes], path: Path) -> Iterator[Row]:
    content = stream.read(MAX_TXT_BYTES + 1)
    if len(content) > MAX_TXT_BYTES:
        raise DataError(
            f"{path} is one text of more than {MAX_TXT_BYTES >> 20} MiB; "
            "set format=lines if each line is a document, or split the file"
        )
    yield Row(1, len(content), content)


def _lines(stream: IO[bytes], path: Path) -> Iterator[Row]:
    # Bytes end a line at \n only: U+2028 and U+0085 inside a text are left alone.
    for number, line in enumerate(stream, start=1):
        if not line.isspace():
            yield Row(number, len(line), line)


def _csv_rows(stream: IO[bytes], path: Path, delimiter: str = "") -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    # Invalid bytes become lone surrogates, which the decoder refuses row by row.
    text = io.TextIOWrapper(stream, encoding="utf-8", errors=keep_invalid(), newline="")
    top: list[str] = []
    while not top or (top[-1] and not top[-1].strip()):
        top.append(text.readline())  # up to the header; "" at the end
    delimiter = delimiter or _delimiter(top[-1])
    reader = csv.reader(chain(filter(None, top), text), delimiter=delimiter, strict=True)
    header = _csv_header(reader, path)
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(number, 0, RowError(f"malformed CSV: {error}"))
            continue
        if not fields:
            continue
        num_bytes = sum(map(len, fields))
        if len(fields) != len(header):
            reason = f"malformed CSV: {len(fields)} fields under a header of {len(header)}"
            yield Row(number, num_bytes, RowError(reason))
        else:
            named = zip(header, fields, strict=True)
            yield Row(number, num_bytes, {name: field for name, field in named if name})


def _delimiter(header: str) -> str:
    """Return what parts the columns: a comma unless the header has only tabs or semicolons."""
    return next((sign for sign in ",\t;" if sign in header), ",")


def _csv_header(reader: Iterator[list[str]], path: Path) -> list[str]:
    """Return the first line with anything in it."""
    try:
        return name_columns(next((fields for fields in reader if any(fields)), []))
    except csv.Error as error:
        raise DataError(
            f"{path} has a malformed header: {error}; it may be of another format or encoding"
        ) from error


def _tsv_rows(stream: IO[bytes], path: Path) -> Iterator[Row]:
    return _csv_rows(stream, path, delimiter="\t")


def _json_values(stream: IO[bytes], path: Path) -> Iterator[Row]:
    """Yield the elements of a JSON list (or the one JSON value of the file), read in pieces."""
    decode = codecs.getincrementaldecoder("utf-8")(errors=keep_invalid()).decode
    parser = json.JSONDecoder()
    buffer, at, number, ended, is_list = "", 0, 0, False, False

    def read_more() -> None:
        nonlocal buffer, at, ended
        piece = stream.read(max(READ_CHARS, len(buffer) - at))
        ended = not piece
        buffer, at = buffer[at:] + decode(piece, final=ended), 0

    def skip(extra: str = "") -> str:
        """Move over white space and ``extra``; return the next character, "" at the end."""
        nonlocal at
        while True:
            while at < len(buffer) and buffer[at] in " \t\r\n" + extra:
                at += 1
            if at < len(buffer) or ended:
                return buffer[at : at + 1]
            read_more()

    is_list = skip() == "["
    at += is_list
    while True:
        following = skip("," if is_list and number else "")
        if is_list and following == "]":
            return
        if not following and not is_list and number:
            return
        try:
            value, end = parser.raw_decode(buffer, at)
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError) and not ended:
                read_more()
                continue
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise DataError(
                f"{path}: broken JSON at record {number + 1}: {reason}; the records after it "
                "cannot be told apart. Repair the file"
            ) from error
        if end == len(buffer) and not ended:  # a number may go on in the next piece
            read_more()
            continue
        number, num_chars, at = number + 1, end - at, end
        if isinstance(value, dict):
            yield Row(number, num_chars, value)
        else:
            yield Row(number, num_chars, RowError(f"expected an object, got {_kind(value)}"))


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
