"""Workbooks as users make them: titles, merged cells, formulas, passwords, several sheets."""

from __future__ import annotations

import datetime
import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msoffcrypto.format.ooxml
import openpyxl
import pytest
import xlwt

from trainer.config import SourceConfig
from trainer.data.chats.conversations import describe_file, find_layout, read_conversations
from trainer.data.reading.readers import read_documents
from trainer.data.reading.records import RejectLog
from trainer.errors import DataError

HEADER = ["問題", "答覆"]
PAIRS = [["黑潮是什麼？", "一道洋流。"], ["它流經哪裡？", "台灣東岸。"]]


def write_xlsx(
    path: Path, rows: list[list[Any]], edit: Callable[[Any], None] | None = None
) -> Path:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    if edit is not None:
        edit(book)
    book.save(path)
    return path


def write_xls(path: Path, rows: list[list[Any]], name: str = "一") -> Path:
    book = xlwt.Workbook()
    sheet = book.add_sheet(name)
    date = xlwt.easyxf(num_format_str="YYYY-MM-DD")
    for y, row in enumerate(rows):
        for x, cell in enumerate(row):
            if isinstance(cell, datetime.date):
                sheet.write(y, x, cell, date)
            elif cell is not None:
                sheet.write(y, x, cell)
    book.save(str(path))
    return path


def read(path: Path, log: RejectLog | None = None, **options: Any) -> list[tuple[int, str, str]]:
    """Return row, question and answer of every conversation of a workbook."""
    source = SourceConfig([str(path)], **options)
    log = log or RejectLog(None, max_bad_row_share=0.0)
    found = []
    for example in read_conversations(source, "s", log):
        user, assistant = example.conversation.messages[-2:]
        found.append((example.row, user.content, assistant.content))
    return found


WRITERS = {"xlsx": write_xlsx, "xls": write_xls}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_rows_are_numbered_as_the_program_shows_them(
    kind: str, suffix: str, tmp_path: Path
) -> None:
    path = WRITERS[kind](tmp_path / f"a.{kind}", [HEADER, PAIRS[0], [], [" ", None], PAIRS[1]])
    if suffix:
        path = tmp_path / "b.data"
        path.write_bytes(gzip.compress((tmp_path / f"a.{kind}").read_bytes()))
    assert read(path) == [(2, *PAIRS[0]), (5, *PAIRS[1])]


@pytest.mark.parametrize("kind", WRITERS)
def test_no_row_of_a_long_sheet_is_lost(kind: str, tmp_path: Path) -> None:
    rows = [[f"問{i}", f"答{i}"] for i in range(100)]
    found = read(WRITERS[kind](tmp_path / f"a.{kind}", [["標題"], HEADER, *rows]))
    assert found == [(i + 3, f"問{i}", f"答{i}") for i in range(100)]


def test_long_and_repeated_names_find_their_header_again(tmp_path: Path) -> None:
    long = "請在這一欄填寫使用者可能提出的各種問題，一列一題，不要合併儲存格"
    path = write_xlsx(
        tmp_path / "a.xlsx", [["表一", "二"], [long, "答覆", "答覆"], *[["問", "錯", "對"]] * 30]
    )
    found = read(path, columns={"prompt": long, "response": "答覆.2"})
    assert found[0] == (3, "問", "對") and len(found) == 30


def test_workbooks_are_told_by_content_not_by_name(tmp_path: Path) -> None:
    path = write_xlsx(tmp_path / "a.xlsx", [HEADER, *PAIRS]).rename(tmp_path / "a.csv")
    assert len(read(path)) == 2


@pytest.mark.parametrize("kind", WRITERS)
def test_titles_above_and_notes_beside_the_header_are_passed_over(
    kind: str, tmp_path: Path
) -> None:
    rows = [["客服問答集（內部使用）"], [], ["編號", *HEADER, None], [1, *PAIRS[0], "無標題的備註"]]
    assert read(WRITERS[kind](tmp_path / f"a.{kind}", rows)) == [(4, *PAIRS[0])]


@pytest.mark.parametrize("kind", WRITERS)
def test_numbers_dates_and_truth_values_read_as_a_person_writes_them(
    kind: str, tmp_path: Path
) -> None:
    values = [5.0, 2.5, 0.1 + 0.2, True, datetime.date(2024, 5, 1), 12345678901]
    rows = [HEADER, *[["問", value] for value in values]]
    answers = [answer for _, _, answer in read(WRITERS[kind](tmp_path / f"a.{kind}", rows))]
    assert answers == ["5", "2.5", "0.3", "TRUE", "2024-05-01", "12345678901"]


def test_times_percentages_and_escaped_carriage_returns(tmp_path: Path) -> None:
    moment = datetime.datetime(2024, 5, 1, 13, 30)
    rows = [
        HEADER,
        ["問", moment],
        ["問", datetime.time(9, 5)],
        ["問", 0.075],
        ["問", "甲_x000D_\n乙"],
    ]

    def edit(book: Any) -> None:
        book.active["B4"].number_format = "0.0%"

    answers = [answer for _, _, answer in read(write_xlsx(tmp_path / "a.xlsx", rows, edit))]
    assert answers == ["2024-05-01 13:30", "09:05", "7.5%", "甲\r\n乙"]


def test_vertically_merged_cell_counts_for_its_rows(tmp_path: Path) -> None:
    rows = [HEADER, ["甲", "一"], [None, "二"], [None, "三"], ["乙", "四"], [None, None]]

    def edit(book: Any) -> None:
        book.active.merge_cells("A2:A4")
        book.active.merge_cells("A5:B5")  # over columns: nothing to repeat

    path = write_xlsx(tmp_path / "a.xlsx", rows, edit)
    log = RejectLog(None, max_bad_row_share=1.0)
    assert read(path, log) == [(2, "甲", "一"), (3, "甲", "二"), (4, "甲", "三")]
    assert (log.num_read, log.num_rejected) == (4, 1)  # merging A5:B5 dropped the answer
    layout = find_layout(path, SourceConfig([str(path)]))
    assert "1 merged cells count for each of their rows" in describe_file(path, layout)


def test_vertically_merged_cell_of_an_xls(tmp_path: Path) -> None:
    book = xlwt.Workbook()
    sheet = book.add_sheet("一")
    for x, name in enumerate(HEADER):
        sheet.write(0, x, name)
    sheet.write_merge(1, 2, 0, 0, "甲")
    sheet.write(1, 1, "一")
    sheet.write(2, 1, "二")
    book.save(str(tmp_path / "a.xls"))
    assert read(tmp_path / "a.xls") == [(2, "甲", "一"), (3, "甲", "二")]


def test_header_merged_over_two_lines_is_no_data(tmp_path: Path) -> None:
    rows = [["問題", "答覆", "來源", None], [None, None, "書", "頁"], [*PAIRS[0], "甲", 7]]

    def edit(book: Any) -> None:
        for cells in ("A1:A2", "B1:B2", "C1:D1"):
            book.active.merge_cells(cells)

    assert read(write_xlsx(tmp_path / "a.xlsx", rows, edit)) == [(3, *PAIRS[0])]


def test_formula_without_a_stored_value_rejects_its_row_only(tmp_path: Path) -> None:
    rows = [["序", *HEADER], ["=ROW()", *PAIRS[0]], [2, "問", '="答"&"案"'], [3, *PAIRS[1]]]
    log = RejectLog(tmp_path / "rejected.jsonl", max_bad_row_share=1.0)
    found = read(write_xlsx(tmp_path / "a.xlsx", rows), log)
    assert found == [(2, *PAIRS[0]), (4, *PAIRS[1])]  # the unread column A may hold one
    assert log.last is not None and log.last.row == 3
    assert "the formula in C3 has no stored value" in log.last.reason


def test_error_values_reject_their_row(tmp_path: Path) -> None:
    path = write_xlsx(tmp_path / "a.xlsx", [HEADER, ["問", "#N/A"], PAIRS[0]])
    log = RejectLog(None, max_bad_row_share=1.0)
    assert read(path, log) == [(3, *PAIRS[0])]
    assert log.last is not None and "cell B2 holds the error #N/A" in log.last.reason


def test_sheets_by_name_and_the_first_visible_one_with_rows(tmp_path: Path) -> None:
    def edit(book: Any) -> None:
        hidden = book.create_sheet("隱藏", 0)
        hidden.append(["x", "y"])
        hidden.sheet_state = "hidden"
        book.create_sheet("空白", 0)
        second = book.create_sheet("二")
        second.append(HEADER)
        second.append(PAIRS[1])

    path = write_xlsx(tmp_path / "a.xlsx", [HEADER, PAIRS[0]], edit)
    assert read(path) == [(2, *PAIRS[0])]
    assert read(path, sheet="二") == [(2, *PAIRS[1])]
    with pytest.raises(DataError, match=r"no sheet '三'; its sheets are 空白, 隱藏, Sheet, 二"):
        read(path, sheet="三")
    layout = find_layout(path, SourceConfig([str(path)]))
    assert "sheet 'Sheet' is read, not '空白', '隱藏', '二'" in describe_file(path, layout)


@pytest.mark.parametrize("kind", ["xlsx", "xls"])
def test_cover_sheet_is_passed_over(kind: str, tmp_path: Path) -> None:
    cover = [["本檔說明"], ["甲", "乙"], ["更新日期", "七月"]]
    table = [["客服集"], HEADER, PAIRS[0]]
    path = tmp_path / f"a.{kind}"
    if kind == "xlsx":

        def edit(book: Any) -> None:
            second = book.create_sheet("二")
            for row in table:
                second.append(row)

        write_xlsx(path, cover, edit)
    else:
        book = xlwt.Workbook()
        for name, rows in (("一", cover), ("二", table)):
            sheet = book.add_sheet(name)
            for y, row in enumerate(rows):
                for x, cell in enumerate(row):
                    sheet.write(y, x, cell)
        book.save(str(path))
    assert read(path) == [(3, *PAIRS[0])]
    named = {"prompt": "更新日期", "response": "七月"}
    layout = find_layout(path, SourceConfig([str(path)]))
    assert any("sheet '二' is read" in line for line in describe_file(path, layout))
    with pytest.raises(DataError, match="holds no row"):
        read(path, columns=named)  # a header in the first sheet, without a row below it


def test_encrypted_workbook_says_what_to_do(tmp_path: Path) -> None:
    plain, locked = io.BytesIO(), tmp_path / "a.xlsx"
    book = openpyxl.Workbook()
    book.active.append(HEADER)
    book.save(plain)
    with locked.open("wb") as file:
        msoffcrypto.format.ooxml.OOXMLFile(plain).encrypt("secret", file)
    with pytest.raises(DataError, match=r"a\.xlsx is protected by a password; .* save a copy"):
        read(locked)


def test_encrypted_xls_too(tmp_path: Path) -> None:
    path = write_xls(tmp_path / "a.xls", [HEADER, *PAIRS])
    # No library writes one: turn the first record into FILEPASS, by which Excel marks them.
    path.write_bytes(path.read_bytes().replace(b"\xe1\x00\x02\x00", b"\x2f\x00\x02\x00", 1))
    with pytest.raises(DataError, match=r"a\.xls is protected by a password"):
        read(path)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_damaged_workbook_is_named(kind: str, share: float, tmp_path: Path) -> None:
    rows = [HEADER, *[[f"問{i}", f"答{i}" * 40] for i in range(300)]]
    path = WRITERS[kind](tmp_path / f"a.{kind}", rows)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match=rf"a\.{kind} is damaged or no workbook .*save it as a new"):
        read(path)


def test_html_named_xls_and_empty_workbook(tmp_path: Path) -> None:
    (tmp_path / "a.xls").write_text("<table><tr><td>問題</td></tr></table>")
    with pytest.raises(DataError, match=r"named \.xls but has not that content"):
        read(tmp_path / "a.xls")
    with pytest.raises(DataError, match="holds no row in any visible sheet"):
        read(write_xlsx(tmp_path / "b.xlsx", []))
    with pytest.raises(DataError, match="holds no row"):
        read(write_xlsx(tmp_path / "c.xlsx", [HEADER]))


def test_columns_of_one_name_are_told_apart(tmp_path: Path) -> None:
    path = write_xlsx(tmp_path / "a.xlsx", [["問題", "答覆", "答覆"], ["問", "甲", "乙"]])
    assert read(path) == [(2, "問", "甲")]
    assert read(path, columns={"response": "答覆.2"}) == [(2, "問", "乙")]


def test_documents_come_out_of_workbooks_too(tmp_path: Path) -> None:
    path = write_xlsx(
        tmp_path / "a.xlsx", [["公告"], ["標題", "內容"], ["一", "黑潮"], ["二", None]]
    )
    log = RejectLog(None, max_bad_row_share=1.0)
    source = SourceConfig([str(path)], text_columns=["內容"])
    assert [d.text for d in read_documents(source, "s", log)] == ["黑潮"]
    assert (log.num_read, log.num_rejected) == (2, 1)
    missing = SourceConfig([str(path)], text_columns=["本文"])
    with pytest.raises(DataError, match=r"no column '本文'; its columns are 標題, 內容"):
        list(read_documents(missing, "s", RejectLog(None, 1.0)))
