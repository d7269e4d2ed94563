"""Rows of Parquet and Arrow files, read a batch at a time; a broken value spoils its row alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.data.reading.columns import missing_column
from trainer.data.reading.raw import Row, RowError
from trainer.errors import DataError

ARROW_BATCH_ROWS = 512


def iterate_table(
    file: IO[bytes], path: Path, format_name: str, columns: Sequence[str] | None
) -> Iterator[Row]:
    """Yield the rows of an open Parquet or Arrow file.

    Args:
        file: open for reading in any order.
        path: of it, to be named.
        format_name: ``parquet`` or ``arrow``.
        columns: text columns, undecoded; None = whole records, with nested values.
    """
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
