"""Every format, plain and compressed, with every defect a row or a file can have."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from trainer.config import SourceConfig
from trainer.data.reading.files import detect_format, list_files
from trainer.data.reading.readers import read_documents
from trainer.data.reading.records import Document, RejectLog
from trainer.errors import DataError

DATA = Path(__file__).resolve().parents[5] / "shared" / "data" / "pretrain"
TEXTS = ["海流 Kuroshio", "line one\nline two", "U+2028\u2028stays", "𠮷 beyond the BMP"]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def as_jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts).encode()


def as_json(texts: list[str]) -> bytes:
    return json.dumps([{"text": t} for t in texts], ensure_ascii=False, indent=1).encode()


def as_csv(texts: list[str], delimiter: str = ",") -> bytes:
    out = io.StringIO()
    rows = csv.writer(out, delimiter=delimiter)
    rows.writerow(["id", "text"])
    rows.writerows([[i, t] for i, t in enumerate(texts)])
    return out.getvalue().encode()


def as_parquet(texts: list[str]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), out)
    return out.getvalue()


def as_arrow_stream(texts: list[str]) -> bytes:
    out, table = io.BytesIO(), pa.table({"text": texts})
    with pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def as_arrow_file(texts: list[str]) -> bytes:
    out, table = io.BytesIO(), pa.table({"text": texts})
    with pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


WRITERS: dict[str, tuple[str, Callable[[list[str]], bytes]]] = {
    "jsonl": (".jsonl", as_jsonl),
    "json": (".json", as_json),
    "json named jsonl": (".jsonl", as_json),
    "jsonl named json": (".json", as_jsonl),
    "csv": (".csv", as_csv),
    "tsv": (".tsv", lambda texts: as_csv(texts, "\t")),
    "parquet": (".parquet", as_parquet),
    "parquet under another name": (".data", as_parquet),
    "arrow stream": (".arrow", as_arrow_stream),
    "arrow file": (".arrow", as_arrow_file),
}


def read(*paths: Path | str, log: RejectLog | None = None, **options: object) -> list[Document]:
    source = SourceConfig(paths=[str(path) for path in paths], **options)  # type: ignore[arg-type]
    return list(read_documents(source, "s", log or RejectLog(None, max_bad_row_share=0.0)))


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", WRITERS)
def test_formats_and_compressions(kind: str, suffix: str, tmp_path: Path) -> None:
    extension, write = WRITERS[kind]
    path = tmp_path / f"file{extension}{suffix}"
    path.write_bytes(COMPRESS[suffix](write(TEXTS)))
    log = RejectLog(None, max_bad_row_share=0.0)
    documents = read(path, log=log)
    assert [document.text for document in documents] == TEXTS
    assert {(document.source, document.file) for document in documents} == {("s", str(path))}
    assert (log.num_read, log.num_accepted, log.num_rejected) == (4, 4, 0)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_txt_is_one_document_and_lines_are_many(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix]("一\n\n二\u2028三\n".encode()))
    assert [d.text for d in read(path)] == ["一\n\n二\u2028三"]
    lines = read(path, format="lines")
    assert [(d.text, d.row) for d in lines] == [("一", 1), ("二\u2028三", 3)]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_wrong_compression_suffix_does_not_matter(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(COMPRESS[suffix](as_jsonl(TEXTS)))
    assert len(read(path)) == 4


def test_concatenated_gzip_and_zstd_members_are_read_to_the_end(tmp_path: Path) -> None:
    for suffix in (".gz", ".zst"):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(COMPRESS[suffix](as_jsonl(TEXTS)) * 2)
        assert len(read(path)) == 8


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_byte_order_mark_is_no_text(kind: str, tmp_path: Path) -> None:
    extension, write = WRITERS[kind]
    path = tmp_path / f"a{extension}"
    path.write_bytes(b"\xef\xbb\xbf" + write(TEXTS))
    assert [d.text for d in read(path)] == TEXTS
    txt = tmp_path / "b.txt"
    txt.write_bytes(b"\xef\xbb\xbf\xe6\x96\x87")
    assert read(txt)[0].text == "文"


def test_arrow_folder_of_datasets(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": TEXTS, "other": [1, 2, 3, 4]})
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    assert [d.text for d in read(tmp_path / "one")] == TEXTS
    assert len(read(tmp_path)) == 4  # found below another folder as well
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match="splits test, train; name one of them"):
        read(tmp_path / "two")
    assert len(read(tmp_path / "two" / "train")) == 4


def test_text_columns_are_joined_and_empty_ones_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {"title": "題", "body": "文"},
        {"title": "", "body": "無題"},
        {"title": None, "body": "x"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [d.text for d in read(path, text_columns=["title", "body"])] == ["題\n文", "無題", "x"]


@pytest.mark.parametrize("kind", [k for k in WRITERS if "lines" not in k])
def test_missing_column_names_those_there_are(kind: str, tmp_path: Path) -> None:
    extension, write = WRITERS[kind]
    path = tmp_path / f"a{extension}"
    path.write_bytes(write(TEXTS))
    with pytest.raises(DataError, match=r"no column 'body'; its columns are .*text") as caught:
        read(path, text_columns=["body"])
    assert str(path) in str(caught.value)


def test_column_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(as_parquet(TEXTS))
    with pytest.raises(DataError, match="'id' holds int64, not text"):
        read(path, text_columns=["id"])


BAD_LINES = {
    b'{"text": "\xff\xfe"}': "invalid UTF-8: byte 0xff at offset 10",
    b'{"text": "a\\u0000b"}': "NUL character at offset 1",
    b'{"text": "a\x00b"}': "malformed JSON",
    b'{"text": "\\ud800"}': "lone surrogate U+D800",
    b'{"text": "\\udfff\\ud800"}': "lone surrogate U+DFFF",
    b'{"text": "never closed}': "malformed JSON",
    b'["a", "list"]': "expected a JSON object, got list",
    b'{"text": 7}': "column 'text' holds int, not text",
    b'{"text": ["a"]}': "column 'text' holds list, not text",
    b'{"text": ""}': "empty text",
    b'{"text": " \\n"}': "empty text",
    b'{"text": null}': "empty text",
    b'{"body": "x"}': "no column 'text'; the columns are body",
    b"[" * 100_000: "malformed JSON",
}


@pytest.mark.faults(row=15)
@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items(), ids=BAD_LINES.values())
@pytest.mark.parametrize("suffix", COMPRESS)
def test_bad_line_is_rejected_with_its_place(
    line: bytes, reason: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](b'{"text": "good"}\n\n' + line + b'\n{"text": "too"}\n'))
    log = RejectLog(tmp_path / "rejected.jsonl", max_bad_row_share=0.5)
    assert [d.text for d in read(path, log=log)] == ["good", "too"]
    assert (log.num_read, log.num_accepted, log.num_rejected) == (3, 2, 1)
    (written,) = [json.loads(x) for x in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert (written["file"], written["row"]) == (str(path), 3)
    assert reason in written["reason"] and written["excerpt"]


def test_paired_surrogate_escapes_are_one_character(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(rb'{"text": "\ud842\udfb7"}')
    assert read(path)[0].text == "𠮷"


@pytest.mark.faults(row=15)
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b"id,text\n1,good\n2,\xff\n3,too\n", "invalid UTF-8"),
        ("a.csv", b"id,text\n1,good\n2,b,c\n3,too\n", "3 fields under a header of 2"),
        ("a.csv", b"id,text\n1,good\n2,\n3,too\n", "empty text"),
        ("a.csv", b'id,text\n1,good\n2,"b"c\n3,too\n', "malformed CSV"),
        ("a.tsv", b"id\ttext\n1\tgood\n2\t\xe6\x96\n3\ttoo\n", "invalid UTF-8"),
        ("a.json", b'[{"text": "good"},\n{"text": "\xff"},\n{"text": "too"}]', "invalid UTF-8"),
        ("a.json", b'[{"text": "good"}, 7, {"text": "too"}]', "expected an object, got int"),
        ("a.json", rb'[{"text": "good"}, {"text": "\udc80"}, {"text": "too"}]', "surrogate U+DC80"),
        ("a.txt", b"good\n\xff\ntoo", "invalid UTF-8"),
    ],
)
def test_bad_row_of_other_formats(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    log = RejectLog(tmp_path / "rejected.jsonl", max_bad_row_share=1.0)
    options = {"format": "lines"} if name.endswith(".txt") else {}
    assert [d.text for d in read(path, log=log, **options)] == ["good", "too"]
    written = json.loads((tmp_path / "rejected.jsonl").read_text())
    assert reason in written["reason"]
    assert written["row"] == (3 if name[2:] in ("csv", "tsv") else 2)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_bad_values_of_tables_do_not_spoil_their_batch(kind: str, tmp_path: Path) -> None:
    values = pa.array([b"good", b"\xff", None, b"a\x00b", b"too"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), len(values), values.buffers())
    table, path = pa.table({"text": column}), tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    log = RejectLog(tmp_path / "rejected.jsonl", max_bad_row_share=1.0)
    assert [d.text for d in read(path, log=log)] == ["good", "too"]
    reasons = [json.loads(x) for x in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [r["row"] for r in reasons] == [2, 3, 4]


def test_dictionary_and_large_string_columns(tmp_path: Path) -> None:
    for i, column in enumerate(
        (pa.array(TEXTS).dictionary_encode(), pa.array(TEXTS, pa.large_string()))
    ):
        path = tmp_path / f"{i}.arrow"
        with pa.ipc.new_stream(str(path), pa.schema({"text": column.type})) as writer:
            writer.write_table(pa.table({"text": column}))
        assert [d.text for d in read(path)] == TEXTS


@pytest.mark.parametrize("extension", [".txt", ".jsonl", ".json", ".csv", ".parquet", ".arrow"])
@pytest.mark.parametrize("suffix", COMPRESS)
def test_empty_file_is_named(extension: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{extension}{suffix}"
    path.write_bytes(COMPRESS[suffix](b""))
    with pytest.raises(DataError, match="is empty") as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", b"\n \n"), ("a.json", b"[]"), ("a.csv", b"id,text\n")]
)
def test_file_without_rows_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} holds no row"):
        read(tmp_path / name)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow file", "csv"])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_file_is_named(kind: str, suffix: str, tmp_path: Path) -> None:
    extension, write = WRITERS[kind]
    path = tmp_path / f"a{extension}{suffix}"
    whole = COMPRESS[suffix](write([f"{i} {hash(i)}" * 20 for i in range(2000)]))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read") as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "arrow stream"])
def test_damaged_table_is_named(kind: str, tmp_path: Path) -> None:
    extension, write = WRITERS[kind]
    path = tmp_path / f"a{extension}"
    whole = write(TEXTS * 500)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        read(path)


def test_broken_json_list_names_the_record(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, {"text": "b"}, {"text": "c"')
    with pytest.raises(DataError, match="broken JSON at record 3"):
        read(path)


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5000])
def test_json_that_python_refuses_names_the_record(value: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(f'[{{"text": "a"}}, {{"text": {value}}}]')
    with pytest.raises(DataError, match=r"a\.json: broken JSON at record 2"):
        read(path)
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "a"}}\n{{"text": {value}}}\n')
    log = RejectLog(None, max_bad_row_share=1.0)
    assert [d.text for d in read(path, log=log)] == ["a"]
    assert log.last is not None and "malformed JSON" in log.last.reason


def test_long_json_list_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "trainer.data.reading.rows.READ_CHARS", 7
    )  # cuts inside characters and numbers
    path = tmp_path / "a.json"
    texts = [t * n for n in (1, 9) for t in TEXTS]
    path.write_bytes(as_json(texts))
    assert [d.text for d in read(path)] == texts


def test_unreadable_unknown_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="matches no file"):
        read(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="matches no file"):
        read(tmp_path / "*.jsonl")
    (tmp_path / "a.bin").write_bytes(b"\x00\x01\x02")
    with pytest.raises(DataError, match="neither name nor content tells the format"):
        read(tmp_path / "a.bin")
    (tmp_path / "b.parquet").write_bytes(b"not that")
    with pytest.raises(DataError, match=r"named .parquet but has not that content"):
        read(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"format='jsnl' is not one of .*did you mean jsonl"):
        detect_format(tmp_path / "a.bin", "jsnl")


def test_globs_folders_and_lists_keep_an_order_and_no_file_twice(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.txt", "sub/.hidden.txt", "notes.md"):
        (tmp_path / name).write_bytes(b"x")
    expected = [tmp_path / name for name in ("a.jsonl.gz", "b.jsonl", "sub/c.txt")]
    assert list_files(SourceConfig([str(tmp_path)])) == expected
    assert list_files(SourceConfig([str(tmp_path / "*.jsonl*"), str(tmp_path)])) == expected
    assert list_files(SourceConfig([str(tmp_path / "**" / "*.txt")])) == [tmp_path / "sub/c.txt"]


@pytest.mark.faults(row=15)
def test_too_many_bad_rows_abort_with_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_jsonl(["good"] * 98) + b"{\n{\n")
    assert len(read(path, log=RejectLog(None, max_bad_row_share=0.02))) == 98
    with pytest.raises(DataError, match=r"2 of 100 rows rejected, 2.00%.*a.jsonl:100: malformed"):
        read(path, log=RejectLog(None, max_bad_row_share=0.019))


@pytest.mark.faults(row=15)
def test_reading_stops_early_when_most_rows_are_bad(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{\n" * 5000)
    log = RejectLog(tmp_path / "rejected.jsonl", max_bad_row_share=0.01)
    with pytest.raises(DataError, match="1000 of 1000 rows rejected"):
        read(path, log=log)
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 1000


@pytest.mark.skipif(not DATA.exists(), reason=f"no real data at {DATA}")
@pytest.mark.parametrize(
    ("name", "options", "num_documents"),
    [
        ("tang_poems.jsonl.gz", {}, 50_021),
        ("archive_tw.jsonl.gz", {}, 256),
        ("lf_c4_demo.jsonl", {}, 300),  # three of its texts hold U+2028
        ("lf_wiki_demo.txt", {"format": "lines"}, 30),
        ("original/poet.tang.0.json", {"text_columns": ["title", "author"]}, 1000),
        ("moe_twblg/twblg_definitions.csv", {"text_columns": ["釋義"]}, 21_856),
    ],
)
def test_real_files(name: str, options: dict[str, object], num_documents: int) -> None:
    log = RejectLog(None, max_bad_row_share=0.0)
    assert len(read(DATA / name, log=log, **options)) == num_documents
