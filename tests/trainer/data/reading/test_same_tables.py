"""One table in every format: the same conversations and the same rejects, whatever its texts."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xlwt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.config import SourceConfig
from trainer.data.chats.conversations import read_conversations
from trainer.data.reading.records import RejectLog

HEADER = ["問題", "回答", "備註"]
Table = list[list[str]]

# What spreadsheets can hold: no control characters, no formula, nothing that needs escaping there.
# cp950's characters are among them, so that one strategy serves all formats.
CHARACTERS = st.sampled_from("黑潮流經台灣東岸，「速度」很快。aZ09 ,;\t\n\"'{}[]|\\許功蓋")
CELLS = st.text(CHARACTERS, max_size=12).filter(lambda text: not text.startswith(("=", "'")))
TABLES = st.lists(st.tuples(CELLS, CELLS, CELLS).map(list), min_size=1, max_size=30)


def write_csv(encoding: str) -> Callable[[Path, Table], None]:
    def write(path: Path, table: Table) -> None:
        with path.open("w", newline="", encoding=encoding) as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([HEADER, *table])

    return write


def write_json(path: Path, table: Table) -> None:
    rows = [dict(zip(HEADER, row, strict=True)) for row in table]
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-16")


def write_jsonl(path: Path, table: Table) -> None:
    rows = (json.dumps(dict(zip(HEADER, row, strict=True)), ensure_ascii=False) for row in table)
    path.write_text("\n".join(rows), encoding="cp950")


def write_parquet(path: Path, table: Table) -> None:
    pq.write_table(pa.table(dict(zip(HEADER, zip(*table, strict=True), strict=True))), path)


def write_xlsx(path: Path, table: Table) -> None:
    book = openpyxl.Workbook()
    for row in [HEADER, *table]:
        book.active.append(row)
    book.save(path)


def write_xls(path: Path, table: Table) -> None:
    book = xlwt.Workbook()
    sheet = book.add_sheet("一")
    for y, row in enumerate([HEADER, *table]):
        for x, cell in enumerate(row):
            sheet.write(y, x, cell)
    book.save(str(path))


WRITERS: dict[str, Callable[[Path, Table], None]] = {
    "a.csv": write_csv("utf-8-sig"),
    "b.csv": write_csv("cp950"),
    "c.csv": write_csv("utf-16"),
    "d.json": write_json,
    "e.jsonl": write_jsonl,
    "f.parquet": write_parquet,
    "g.xlsx": write_xlsx,
    "h.xls": write_xls,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(table=TABLES)
def test_a_table_reads_the_same_in_every_format(table: Table, folder: Path) -> None:
    table = [["黑潮是什麼？", "一道洋流。", ""], *table]  # a blank row of a sheet is no row at all
    expected = [row[:2] for row in table if row[0].strip() and row[1].strip()]
    for number, (name, write) in enumerate(WRITERS.items()):
        # A name of its own for each content: what was found about a file is remembered.
        path = folder / f"{abs(hash(str(table)))}-{number}{Path(name).suffix}"
        write(path, table)
        log = RejectLog(None, max_bad_row_share=1.0)
        examples = list(read_conversations(SourceConfig([str(path)]), "s", log))
        found = [[m.content for m in example.conversation.messages] for example in examples]
        assert found == expected, name
        assert log.num_read == log.num_accepted + log.num_rejected
        path.unlink()
