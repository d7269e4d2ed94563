"""Files in the encodings that Taiwanese spreadsheets and older tools write."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import SourceConfig
from trainer.data.chats.conversations import find_layout, read_conversations
from trainer.data.reading.encodings import as_utf8, guess_encoding
from trainer.data.reading.files import detect_encoding
from trainer.data.reading.readers import read_documents
from trainer.data.reading.records import RejectLog
from trainer.errors import DataError

TEXTS = ["黑潮流經台灣東岸，帶來溫暖的海水。", "它的流速很快，漁民稱它為「黑水溝」。"]
SIMPLIFIED = ["黑潮流经台湾东岸，带来温暖的海水。", "它的流速很快，渔民称它为“黑水沟”。"]
ENCODINGS = ("utf-8", "utf-8-sig", "cp950", "utf-16", "utf-16-le", "utf-16-be")
MARK = {"utf-16-be-mark": b"\xfe\xff"}


def as_csv(texts: list[str]) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["問題", "答案"])
    writer.writerows([[text, text[::-1]] for text in texts])
    return out.getvalue()


def as_jsonl(texts: list[str]) -> str:
    rows = ({"問題": text, "答案": text[::-1]} for text in texts)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_json(texts: list[str]) -> str:
    return json.dumps([{"問題": text, "答案": text[::-1]} for text in texts], ensure_ascii=False)


WRITERS = {"csv": as_csv, "jsonl": as_jsonl, "json": as_json}


def questions(path: Path, log: RejectLog | None = None, **options: Any) -> list[str]:
    source = SourceConfig([str(path)], **options)
    log = log or RejectLog(None, max_bad_row_share=0.0)
    examples = read_conversations(source, "s", log)
    return [example.conversation.messages[0].content for example in examples]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_text_format_in_every_encoding(
    encoding: str, kind: str, suffix: str, tmp_path: Path
) -> None:
    content = WRITERS[kind](TEXTS).encode(encoding)
    path = tmp_path / f"a.{kind}{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    assert questions(path) == TEXTS


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_documents_too(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\n".join(TEXTS).encode(encoding))
    log = RejectLog(None, max_bad_row_share=0.0)
    whole = [d.text for d in read_documents(SourceConfig([str(path)]), "s", log)]
    assert whole == ["\n".join(TEXTS)]
    lines = SourceConfig([str(path)], format="lines")
    assert [d.text for d in read_documents(lines, "s", log)] == TEXTS


@pytest.mark.parametrize(
    ("text", "encoding", "expected"),
    [
        ("\n".join(TEXTS), "utf-8", "utf-8"),
        ("\n".join(TEXTS), "cp950", "cp950"),
        ("\n".join(SIMPLIFIED), "gb18030", "gb18030"),
        ("問題,答案\n好,是\n", "cp950", "cp950"),
        ("a stray €, naïve café and “quotes” – more\n" * 3, "cp1252", "cp1252"),
        ("plain ASCII", "utf-8", "utf-8"),
        ("一問,一答\n一二三,三二一\n", "utf-16-le", "utf-16-le"),  # 一 is U+4E00: a zero byte
        ("一問,一答\n一二三,三二一\n", "utf-16-be", "utf-16-be"),
        ("渭城朝雨浥輕塵客舍青青柳色新", "utf-16-le", "utf-16-le"),  # not a single ASCII character
        ("with a \x00 and 中文", "utf-8", "utf-8"),
        ("plain ASCII in two bytes each", "utf-16-le", "utf-16-le"),
        ("嘅嗰啲唔係喺度\n佢哋嚟咗㗎喇\n" * 3, "big5hkscs", "big5hkscs"),
    ],
)
def test_guess(text: str, encoding: str, expected: str) -> None:
    assert guess_encoding(text.encode(encoding), is_whole=True) == expected


@pytest.mark.parametrize("encoding", ["utf-8", "cp950", "gb18030"])
def test_guess_of_a_piece_that_ends_inside_a_character(encoding: str) -> None:
    text = SIMPLIFIED if encoding == "gb18030" else TEXTS
    one_line = "".join(text * 20).encode(encoding)
    lines = "\n".join(text * 20).encode(encoding)
    for whole in (one_line, lines):
        for cut in range(1, 5):
            assert guess_encoding(whole[:-cut], is_whole=False) == encoding


def test_characters_far_behind_ascii_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    ascii_rows = [f"question {i}" for i in range(20_000)]
    path.write_bytes(as_csv(ascii_rows).replace("問題,答案", "question,answer").encode())
    with path.open("ab") as file:
        file.write("最後一題是什麼呢,這是最後一題的答案\r\n".encode("cp950"))
    assert path.stat().st_size > 1 << 19
    assert detect_encoding(path) == "cp950"
    assert questions(path)[-1] == "最後一題是什麼呢"


def test_mixed_encodings_reject_rows_not_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    lines = as_csv(TEXTS * 10).encode("cp950").split(b"\r\n")
    lines[5] = b'\xff\xff,"x"'
    lines[7] = b"\xa4,\xa4\xa4"  # a first byte without its second
    path.write_bytes(b"\r\n".join(lines))
    log = RejectLog(tmp_path / "rejected.jsonl", max_bad_row_share=1.0)
    assert len(questions(path, log)) == 18
    assert (log.num_read, log.num_accepted, log.num_rejected) == (20, 18, 2)
    rows = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == [6, 8]
    assert "byte 0xff is not of the file's encoding" in rows[0]["reason"]


def test_a_few_foreign_rows_do_not_turn_an_utf8_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = as_jsonl(TEXTS * 10).encode().splitlines()
    lines[3] = as_jsonl(TEXTS[:1]).encode("cp950").strip()
    path.write_bytes(b"\n".join(lines))
    log = RejectLog(tmp_path / "rejected.jsonl", max_bad_row_share=1.0)
    assert len(questions(path, log)) == 19
    assert log.last is not None and log.last.row == 4 and "invalid UTF-8" in log.last.reason
    as_documents = RejectLog(None, max_bad_row_share=1.0)
    source = SourceConfig([str(path)], text_columns=["問題"])
    assert len(list(read_documents(source, "s", as_documents))) == 19


def test_a_bad_byte_in_a_json_list_of_one_line_rejects_one_record(tmp_path: Path) -> None:
    for encoding in ("cp950", "utf-8"):
        whole = as_json(TEXTS * 10).encode(encoding)
        at = whole.index("流".encode(encoding), len(whole) // 2)
        path = tmp_path / f"{encoding}.json"
        path.write_bytes(whole[:at] + b"\xff" + whole[at:])
        log = RejectLog(None, max_bad_row_share=1.0)
        assert len(questions(path, log)) == 19
        assert log.last is not None and "byte 0xff" in log.last.reason, encoding


def test_forced_encoding_wins_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(as_csv(TEXTS).encode("cp950"))
    assert questions(path, encoding="big5") == TEXTS
    assert find_layout(path, SourceConfig([str(path)], encoding="big5")).encoding == "big5"
    with pytest.raises(DataError, match="no column is known to hold"):
        questions(path, encoding="utf-8")
    with pytest.raises(DataError, match="its columns are ") as caught:
        questions(path, encoding="ascii")
    assert str(caught.value).encode("utf-8")  # can be printed
    for name in ("big-five", "base64", "undefined"):
        with pytest.raises(DataError, match=f"encoding='{name}' is not an encoding"):
            questions(path, encoding=name)


@pytest.mark.parametrize("sign", ["\t", ";"])
def test_csv_with_other_signs_between_columns(sign: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"  # as spreadsheets save "Unicode text"
    rows = [["", ""], ["問題", "答案"], *([text, "有,逗號"] for text in TEXTS)]
    path.write_bytes("\r\n".join(sign.join(row) for row in rows).encode("utf-16"))
    log = RejectLog(None, max_bad_row_share=0.0)
    source = SourceConfig([str(path)])
    examples = list(read_conversations(source, "s", log))
    assert [e.conversation.messages[0].content for e in examples] == TEXTS
    assert {e.conversation.messages[1].content for e in examples} == {"有,逗號"}
    assert [e.row for e in examples] == [3, 4]


def test_chosen_encoding_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(as_csv(TEXTS).encode("cp950"))
    with caplog.at_level("INFO"):
        questions(path)
    assert f"{path}: read as cp950" in caplog.text


@settings(max_examples=150, deadline=None)
@given(
    content=st.binary(max_size=300),
    encoding=st.sampled_from(["cp950", "utf-16", "utf-16-le", "gb18030", "utf-8-sig"]),
)
def test_transcoding_never_fails_and_keeps_good_text(content: bytes, encoding: str) -> None:
    found = as_utf8(io.BytesIO(content), encoding).read().decode("utf-8", "surrogatepass")
    try:
        expected = content.decode(encoding)
    except UnicodeDecodeError:
        assert any(0xDC00 <= ord(c) <= 0xDCFF for c in found)
    else:
        assert found == expected.removeprefix("\ufeff")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_get_an_encoding(content: bytes, is_whole: bool) -> None:
    assert "".encode(guess_encoding(content, is_whole)) is not None
