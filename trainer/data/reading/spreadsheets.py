"""Sheets of .xlsx and .xls workbooks as rows under a header."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO

from trainer.config import nearest
from trainer.data.reading.answer_columns import guess_answers
from trainer.data.reading.columns import guess_columns, name_columns
from trainer.data.reading.raw import Row
from trainer.data.reading.sheets import Cell, Merge, Sheet, open_xls, open_xlsx
from trainer.errors import DataError

HEADER_ROWS = 20  # looked through for the header: titles and notes may stand above it
TELLING = {"prompt", "response", "chosen"}  # columns that a header of several known names has
HEADER_CHARS = 24  # longer cells are no headers
OPENERS: dict[str, Callable[[IO[bytes]], list[Sheet]]] = {"xlsx": open_xlsx, "xls": open_xls}

logger = logging.getLogger(__name__)


def iterate_sheet(
    file: IO[bytes], path: Path, format_name: str, sheet: str | None, wanted: Sequence[str]
) -> Iterator[Row]:
    """Yield the rows of a sheet by header; empty rows are no rows.

    Args:
        file: the workbook, seekable.
        path: its name, for errors.
        format_name: xlsx or xls.
        sheet: the sheet's name; None = the first visible one with a known header.
        wanted: names that the header is known to have, if any.

    Raises:
        DataError: the workbook is encrypted or damaged, or has no such sheet.
    """
    with naming_the_workbook(file, path):
        chosen = choose_sheet(OPENERS[format_name](file), path, sheet, wanted)
        yield from _rows_below_header(chosen, wanted)


def describe_sheet(
    file: IO[bytes], path: Path, format_name: str, sheet: str | None, wanted: Sequence[str] = ()
) -> list[str]:
    """Return what a user should know of a sheet: its name, the others, its merged cells."""
    with naming_the_workbook(file, path):
        sheets = OPENERS[format_name](file)
        chosen = choose_sheet(sheets, path, sheet, wanted)
        others = [other.name for other in sheets if other is not chosen]
        remarks = [f"sheet {chosen.name!r} is read"]
        if others:
            remarks[0] += f", not {', '.join(map(repr, others))}"
        num_merged = sum(merge.last_row > merge.first_row for merge in chosen.merges)
        if num_merged:
            remarks.append(f"{num_merged} merged cells count for each of their rows")
        return remarks


@contextmanager
def naming_the_workbook(file: IO[bytes], path: Path) -> Iterator[None]:
    """Turn whatever a reader of workbooks raises into a DataError that says what to do."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:  # damage shows as errors of zip, XML, struct, types and keys alike
        file.seek(0)
        if _is_encrypted(file.read(), error):
            raise DataError(
                f"{path} is protected by a password; open it, save a copy without one, and read "
                "that"
            ) from error
        raise DataError(
            f"{path} is damaged or no workbook ({type(error).__name__}: {error}); open it in a "
            "spreadsheet program and save it as a new .xlsx file"
        ) from error


def _is_encrypted(content: bytes, error: Exception) -> bool:
    package = "EncryptedPackage".encode("utf-16-le")  # stream of an encrypted .xlsx
    return package in content or "encrypted" in str(error).lower()


def choose_sheet(
    sheets: list[Sheet], path: Path, name: str | None, wanted: Sequence[str] = ()
) -> Sheet:
    """Return the sheet ``name``, or the first visible one with the header ``wanted``.

    Without such a sheet it is the first with a header of known words, so that a cover sheet is
    passed over; else the first with rows.

    Raises:
        DataError: there is none; the message names those there are.
    """
    names = [sheet.name for sheet in sheets]
    if name is not None:
        for sheet in sheets:
            if sheet.name == name:
                return sheet
        raise DataError(
            f"{path} has no sheet {name!r}; its sheets are {', '.join(names)}{nearest(name, names)}"
        )
    tops = [(sheet, _top_rows(sheet)) for sheet in sheets if sheet.is_visible]
    for found in (
        lambda rows: _header_with(wanted, rows) is not None,
        lambda rows: _guessed_header(rows) is not None,
        lambda rows: len(rows) > 1,
        bool,
    ):
        for sheet, rows in tops:
            if found(rows):
                return sheet
    raise DataError(f"{path} holds no row in any visible sheet ({', '.join(names)})")


def _top_rows(sheet: Sheet) -> list[list[Cell]]:
    filled = (cells for _, cells in sheet.rows() if _is_filled(cells))
    return list(islice(filled, HEADER_ROWS))


def _is_filled(cells: Sequence[Cell]) -> bool:
    return any(cell is not None for cell in cells)


def _rows_below_header(sheet: Sheet, wanted: Sequence[str]) -> Iterator[Row]:
    rows = ((number, cells) for number, cells in sheet.rows() if _is_filled(cells))
    top = list(islice(rows, HEADER_ROWS))
    at = _find_header([cells for _, cells in top], wanted)
    header_row, cells = top[at]
    names = name_columns(cells)
    # A header of two lines: cells merged over both, and what stands beside them below.
    last_header_row = max(
        [m.last_row for m in sheet.merges if m.first_row <= header_row <= m.last_row],
        default=header_row,
    )
    below = [merge for merge in sheet.merges if merge.first_row > last_header_row]
    for number, cells in _fill_merged(chain(top[at + 1 :], rows), below):
        if number > last_header_row:
            # Cells beyond the header's width have no name.
            padded = [*cells, *[None] * (len(names) - len(cells))]
            value = {name: padded[i] for i, name in enumerate(names) if name}
            if _is_filled(list(value.values())):
                yield Row(number, sum(len(c) for c in value.values() if c is not None), value)


def _find_header(rows: list[list[Cell]], wanted: Sequence[str]) -> int:
    """Return the place of the header among the first rows."""
    for at in (_header_with(wanted, rows), _guessed_header(rows)):
        if at is not None:
            return at
    return next((at for at, cells in enumerate(_short_texts(rows)) if len(cells) > 1), 0)


def _header_with(wanted: Sequence[str], rows: list[list[Cell]]) -> int | None:
    if not wanted:
        return None
    return next((at for at, row in enumerate(rows) if set(wanted) <= set(name_columns(row))), None)


def _guessed_header(rows: list[list[Cell]]) -> int | None:
    for at, cells in enumerate(_short_texts(rows)):
        guessed = set(guess_columns(cells)) | set(guess_answers(cells))
        if "messages" in guessed or (len(guessed) > 1 and TELLING & guessed):
            return at
    return None


def _short_texts(rows: list[list[Cell]]) -> list[list[str]]:
    return [[c for c in row if isinstance(c, str) and len(c) <= HEADER_CHARS] for row in rows]


def _fill_merged(
    rows: Iterator[tuple[int, list[Cell]]], merges: Sequence[Merge]
) -> Iterator[tuple[int, list[Cell]]]:
    """Repeat the value of a cell merged over several rows in each of them."""
    begins = {(merge.first_row, merge.column): merge.last_row for merge in merges}
    open_merges: dict[int, tuple[int, Cell]] = {}
    for number, cells in rows:
        for column, cell in enumerate(cells):
            last_row = begins.get((number, column))
            if last_row is not None:
                open_merges[column] = (last_row, cell)
        for column, (last_row, value) in open_merges.items():
            if number <= last_row:
                cells.extend([None] * (column + 1 - len(cells)))
                cells[column] = value
        yield number, cells
