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
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.data.reading.columns import name_columns
from trainer.data.reading.encodings import keep_invalid
from trainer.data.reading.files import BINARY_FORMATS, open_bytes, open_seekable
from trainer.data.reading.raw import Row, RowError, printable
from trainer.data.reading.spreadsheets import iterate_sheet
from trainer.errors import DataError

MAX_TXT_BYTES = 1 << 28  # a "document" above 256 MiB is a corpus, to be read as lines
READ_CHARS = 1 << 20
ARROW_BATCH_ROWS = 512


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
                yield from _table_rows(file, path, format_name, columns)
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


def _table_rows(
    file: IO[bytes], path: Path, format_name: str, columns: Sequence[str] | None
) -> Iterator[Row]:
    number = 0
    for batch in _record_batches(file, format_name, path, columns):
        for num_bytes, value in _nested(batch) if columns is None else _texts(batch, columns, path):
            number += 1
            yield Row(number, num_bytes, value)


def _texts(
    batch: pa.RecordBatch, columns: Sequence[str], path: Path
) -> Iterator[tuple[int, dict[str, Any]]]:
    lists = [_as_bytes(batch, name, path) for name in columns]
    for values in zip(*lists, strict=True):
        num_bytes = sum(len(value) for value in values if value is not None)
        yield num_bytes, dict(zip(columns, values, strict=True))


def _nested(batch: pa.RecordBatch) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Yield whole records; one that does not decode does not spoil its batch."""
    num_bytes = batch.nbytes // max(batch.num_rows, 1)
    try:
        records: list[dict[str, Any] | RowError] = batch.to_pylist()
    except UnicodeDecodeError:
        records = [_one_record(batch.slice(at, 1)) for at in range(batch.num_rows)]
    yield from ((num_bytes, record) for record in records)


def _one_record(batch: pa.RecordBatch) -> dict[str, Any] | RowError:
    try:
        record: dict[str, Any] = batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return RowError(f"invalid UTF-8: byte 0x{error.object[error.start]:02x}")
    return record


def _record_batches(
    file: IO[bytes], format_name: str, path: Path, columns: Sequence[str] | None
) -> Iterator[pa.RecordBatch]:
    if format_name == "parquet":
        parquet = pq.ParquetFile(file)
        _check_columns(parquet.schema_arrow.names, columns or (), path)
        yield from parquet.iter_batches(ARROW_BATCH_ROWS, columns=columns)
        return
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    # `datasets` writes the stream layout; `feather` and others the file layout with a footer.
    reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
    _check_columns(reader.schema.names, columns or (), path)
    batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
    for batch in batches:
        for column in batch.columns:
            refuse_broken(column)
        for start in range(0, batch.num_rows, ARROW_BATCH_ROWS):
            yield batch.slice(start, ARROW_BATCH_ROWS)


def refuse_broken(array: pa.Array) -> None:
    """Raise ArrowInvalid where lengths and offsets lead out of an array's memory.

    Arrow trusts what a file says of them: reading a value behind a broken one ends the process.
    Texts are looked at as bytes, since invalid UTF-8 spoils its row alone.
    """
    kind = array.type
    if pa.types.is_dictionary(kind):
        array.indices.validate(full=True)
        refuse_broken(array.dictionary)
        array.validate()
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        wide = pa.types.is_large_string(kind)
        array.view(pa.large_binary() if wide else pa.binary()).validate(full=True)
    elif pa.types.is_struct(kind):
        array.validate()
        for at in range(kind.num_fields):
            refuse_broken(array.field(at))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        array.validate()
        places = array.offsets
        steps = pc.subtract(places.slice(1), places.slice(0, len(places) - 1))
        lowest, inside = pc.min(steps).as_py(), (pc.max(places).as_py() or 0) <= len(array.values)
        if (lowest is not None and lowest < 0) or not inside:
            raise pa.ArrowInvalid("offsets of a list lead out of its values")
        refuse_broken(array.values)
    else:
        array.validate(full=True)


def _as_bytes(batch: pa.RecordBatch, name: str, path: Path) -> list[bytes | None]:
    """Return a text column as undecoded bytes, so that one bad value does not spoil its batch."""
    column = batch.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any(is_kind(column.type) for is_kind in kinds):
        raise DataError(
            f"{path}: column {name!r} holds {column.type}, not text; choose text_columns from "
            f"{', '.join(batch.schema.names)}"
        )
    return column.cast(pa.large_binary()).to_pylist()


def _check_columns(present: list[str], wanted: Sequence[str], path: Path) -> None:
    for name in wanted:
        if name not in present:
            raise DataError(missing_column(path, name, present))


def missing_column(path: Path, name: str, present: list[str]) -> str:
    """Say that ``path`` has no column ``name``, and which it has."""
    return (
        f"{path} has no column {name!r}; its columns are {printable(', '.join(present))}: "
        "set the source's text_columns"
    )
