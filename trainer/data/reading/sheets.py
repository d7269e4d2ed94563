"""Workbooks through openpyxl (.xlsx) and xlrd (.xls): cells as text, merged ranges, formulas."""

from __future__ import annotations

import datetime
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import openpyxl
import xlrd
from openpyxl.utils.cell import get_column_letter, range_boundaries
from openpyxl.utils.escape import unescape

from trainer.data.reading.raw import BadCell

Cell = str | BadCell | None  # None = nothing in it
PIECE_BYTES = 1 << 20
MAX_TAG_BYTES = 1 << 10
MERGE = re.compile(rb'<(?:\w+:)?mergeCell\s[^>]*?ref="([A-Z0-9:]+)"')
FORMULA = re.compile(rb"<(?:\w+:)?f[\s>/]")


class Merge(NamedTuple):
    """Rows (1-based) over which the first cell of a column (0-based) is merged."""

    first_row: int
    last_row: int
    column: int


@dataclass(frozen=True)
class Sheet:
    """A sheet whose rows are read when asked for; each call of ``rows`` starts anew."""

    name: str
    is_visible: bool
    merges: Sequence[Merge]
    rows: Callable[[], Iterator[tuple[int, list[Cell]]]]


def open_xlsx(file: IO[bytes]) -> list[Sheet]:
    """Return the sheets of an .xlsx workbook; raises whatever openpyxl does for a damaged one."""
    # It warns of parts that it leaves out when saving, such as rules for input.
    warnings.filterwarnings("ignore", category=UserWarning, module="openpyxl")
    values = openpyxl.load_workbook(file, read_only=True, data_only=True)
    with zipfile.ZipFile(file) as archive:
        return [_xlsx_sheet(file, archive, sheet) for sheet in values.worksheets]


def _xlsx_sheet(file: IO[bytes], archive: zipfile.ZipFile, sheet: Any) -> Sheet:
    sheet.reset_dimensions()  # programs write wrong ones, and rows would be cut
    merges, has_formulas = _scan(archive, sheet._worksheet_path.lstrip("/"))

    def rows() -> Iterator[tuple[int, list[Cell]]]:
        if not has_formulas:
            for number, cells in enumerate(sheet.iter_rows(), 1):
                yield number, [_xlsx_text(cell, None) for cell in cells]
            return
        # A formula whose value was never computed reads as an empty cell: look at both.
        book = openpyxl.load_workbook(file, read_only=True, data_only=False)
        formulas = book[sheet.title]
        formulas.reset_dimensions()
        pairs = zip(sheet.iter_rows(), formulas.iter_rows(), strict=True)
        for number, (cells, written) in enumerate(pairs, 1):
            yield number, [_xlsx_text(*pair) for pair in zip(cells, written, strict=True)]

    return Sheet(sheet.title, sheet.sheet_state == "visible", merges, rows)


def _scan(archive: zipfile.ZipFile, name: str) -> tuple[list[Merge], bool]:
    """Return merged ranges of a sheet, which openpyxl passes over, and whether it has formulas."""
    merges, has_formulas, tail = [], False, b""
    with archive.open(name) as xml:
        while piece := xml.read(PIECE_BYTES):
            text = tail + piece
            has_formulas = has_formulas or FORMULA.search(text) is not None
            end = 0
            for match in MERGE.finditer(text):
                column, first_row, _, last_row = range_boundaries(match[1].decode())
                merges.append(Merge(first_row, last_row, column - 1))
                end = match.end()
            tail = text[max(end, len(text) - MAX_TAG_BYTES) :]
    return merges, has_formulas


def _xlsx_text(cell: Any, written: Any) -> Cell:
    value = cell.value
    if value is None:
        formula = None if written is None else written.value
        if formula is None:
            return None
        place = f"{get_column_letter(written.column)}{written.row}"
        return BadCell(
            f"the formula in {place} has no stored value; open the file in a spreadsheet program "
            "and save it, or paste values"
        )
    if cell.data_type == "e":
        return BadCell(f"cell {cell.coordinate} holds the error {value}")
    if isinstance(value, float) and "%" in (cell.number_format or ""):
        return f"{value * 100:.15g}%"
    return _text(value)


def _text(value: object) -> str | None:
    """Return a cell's value the way a person would write it; None for blank text."""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float):
        return f"{value:.15g}"  # the digits that Excel keeps
    if isinstance(value, datetime.datetime):
        if value.time() == datetime.time():
            return value.date().isoformat()
        return value.isoformat(" ", "seconds").removesuffix(":00")
    if isinstance(value, datetime.time):
        return value.isoformat("seconds").removesuffix(":00")
    text = str(value)
    text = unescape(text) if "_x" in text else text  # _x000D_ for a carriage return
    return text if text.strip() else None


def open_xls(file: IO[bytes]) -> list[Sheet]:
    """Return the sheets of an .xls workbook; raises whatever xlrd does for a damaged one."""
    file.seek(0)
    with open("/dev/null", "w") as nowhere:  # noqa: PTH123 (xlrd prints what it finds odd)
        book = xlrd.open_workbook(file_contents=file.read(), formatting_info=True, logfile=nowhere)
    return [_xls_sheet(book, sheet) for sheet in book.sheets()]


def _xls_sheet(book: Any, sheet: Any) -> Sheet:
    merges = [Merge(first + 1, end, column) for first, end, column, _ in sheet.merged_cells]

    def rows() -> Iterator[tuple[int, list[Cell]]]:
        for at in range(sheet.nrows):
            yield at + 1, [_xls_text(book, cell, at, x) for x, cell in enumerate(sheet.row(at))]

    return Sheet(sheet.name, sheet.visibility == 0, merges, rows)


def _xls_text(book: Any, cell: Any, row: int, column: int) -> Cell:
    if cell.ctype in (xlrd.XL_CELL_EMPTY, xlrd.XL_CELL_BLANK):
        return None
    if cell.ctype == xlrd.XL_CELL_ERROR:
        name = xlrd.error_text_from_code.get(cell.value, cell.value)
        return BadCell(f"cell {get_column_letter(column + 1)}{row + 1} holds the error {name}")
    if cell.ctype == xlrd.XL_CELL_BOOLEAN:
        return _text(bool(cell.value))
    if cell.ctype == xlrd.XL_CELL_DATE:
        moment = xlrd.xldate_as_datetime(cell.value, book.datemode)
        return _text(moment.time() if cell.value < 1 else moment)
    return _text(cell.value)
