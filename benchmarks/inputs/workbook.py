"""An Excel workbook of questions and answers, as an office keeps one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from openpyxl import Workbook
from openpyxl.cell import WriteOnlyCell
from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

HEADERS = ("編號", "問題", "回答")
MAX_CELL_CHARS = 32_767  # Excel's limit


def write_workbook(rows: Iterable[Mapping[str, str]], path: Path) -> dict[str, int]:
    """Write rows in Alpaca's form as numbered questions and answers, headers first.

    Args:
        rows: ``instruction``, ``input``, ``output``; an input follows its instruction on a new
            line.
        path: the .xlsx file, written anew.

    Returns:
        How many rows there are, how many lost control characters that no workbook can hold, and
        how many are left out because a cell is too small for them.
    """
    book = Workbook(write_only=True)
    sheet = book.create_sheet("問答")
    sheet.append(HEADERS)
    counts = {"rows": 0, "cleaned": 0, "too_long": 0}
    for row in rows:
        question = "\n".join(filter(None, (row["instruction"], row["input"])))
        cells = [ILLEGAL_CHARACTERS_RE.sub("", text) for text in (question, row["output"])]
        if max(map(len, cells)) > MAX_CELL_CHARS:
            counts["too_long"] += 1
            continue
        counts["rows"] += 1
        counts["cleaned"] += cells != [question, row["output"]]
        texts = [WriteOnlyCell(sheet, text) for text in cells]
        for cell in texts:
            cell.data_type = "s"  # or a text that begins with = becomes a formula
        sheet.append([counts["rows"], *texts])
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)
    return counts
