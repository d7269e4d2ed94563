"""The workbook of questions and answers that the Excel experiment is trained on."""

from __future__ import annotations

from pathlib import Path

import openpyxl

from benchmarks.inputs.workbook import MAX_CELL_CHARS, write_workbook


def test_rows_become_numbered_questions_and_answers(tmp_path: Path) -> None:
    rows = [
        {"instruction": "翻成英文", "input": "黑潮", "output": "Kuroshio"},
        {"instruction": "太長", "input": "", "output": "長" * (MAX_CELL_CHARS + 1)},
        {"instruction": "鈴\x07聲", "input": "", "output": "=1+1"},
    ]
    path = tmp_path / "new" / "book.xlsx"
    counts = write_workbook(rows, path)
    assert counts == {"rows": 2, "cleaned": 1, "too_long": 1}
    sheet = openpyxl.load_workbook(path, data_only=True)["問答"]
    assert list(sheet.iter_rows(values_only=True)) == [
        ("編號", "問題", "回答"),
        (1, "翻成英文\n黑潮", "Kuroshio"),
        (2, "鈴聲", "=1+1"),
    ]
