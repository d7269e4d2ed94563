"""From files to conversations: every real file, tables with nested columns, and no crash at all."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.config import SourceConfig
from trainer.data.chats.chat_rows import read_conversation
from trainer.data.chats.conversations import (
    Example,
    find_layout,
    read_conversations,
    walk_conversations,
)
from trainer.data.chats.layouts import Layout
from trainer.data.reading.raw import RowError
from trainer.data.reading.records import RejectLog
from trainer.data.reading.remarks import Remarks
from trainer.errors import DataError

SFT = Path(__file__).resolve().parents[5] / "shared" / "data" / "sft"
needs_data = pytest.mark.skipif(not SFT.exists(), reason=f"no real data at {SFT}")
CALL = {"function": {"name": "weather", "arguments": {"city": "台北"}}}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "問"}, {"role": "assistant", "content": "答"}],
    [
        {"role": "user", "content": "天氣"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "晴"},
        {"role": "assistant", "content": "晴天。"},
    ],
]


def read(
    path: Path, log: RejectLog | None = None, remarks: Remarks | None = None, **options: Any
) -> list[Example]:
    source = SourceConfig([str(path)], **options)
    return list(read_conversations(source, "s", log or RejectLog(None, 0.0), remarks))


# name: (read, rejected, remarks)
REAL: dict[str, tuple[int, int, dict[str, int]]] = {
    "belle/dev1K.json": (1000, 0, {"outer_space": 832}),
    "belle/zh_seed_tasks.json": (175, 0, {}),
    "derived_tw/alpaca_zh_demo_s2twp.json.gz": (1000, 0, {"duplicates": 8}),
    "derived_tw/belle_dev1K_s2twp.json.gz": (1000, 0, {"outer_space": 832}),
    "drcd/DRCD_dev.json": (3524, 0, {}),
    "llama_factory/alpaca_en_demo.json": (999, 0, {"duplicates": 14}),
    "llama_factory/alpaca_zh_demo.json": (1000, 0, {"duplicates": 8}),
    "llama_factory/examples_history.json": (2, 0, {}),
    "llama_factory/glaive_toolcall_en_demo.json": (300, 0, {"duplicates": 35}),
    "llama_factory/glaive_toolcall_zh_demo.json": (300, 2, {"duplicates": 43}),
    "llama_factory/identity.json": (91, 0, {"placeholders": 85}),
    "llama_factory/reason_tool_use_demo_50.jsonl": (50, 0, {}),
    "llama_factory/v1_sft_demo.jsonl": (500, 0, {"placeholders": 50, "duplicates": 1}),
    "stanford_alpaca/alpaca_5000.json": (5000, 2, {}),
    "stanford_alpaca/seed_tasks.jsonl": (175, 0, {}),
    "tang_hw5/Tang_training_data.json": (5001, 0, {"duplicates": 38}),
}


@needs_data
@pytest.mark.parametrize("name", REAL)
def test_real_file(name: str, tmp_path: Path) -> None:
    num_read, num_rejected, expected = REAL[name]
    log, remarks = RejectLog(tmp_path / "rejected.jsonl", max_bad_row_share=0.01), Remarks()
    examples = read(SFT / name, log, remarks)
    assert (log.num_read, log.num_rejected) == (num_read, num_rejected)
    assert len(examples) == log.num_accepted == num_read - num_rejected
    assert remarks.counts == expected
    assert all(example.conversation.messages[-1].role == "assistant" for example in examples)


@needs_data
def test_every_real_file_is_known() -> None:
    """Two are apart: questions without answers, and answers as plain text."""
    names = {str(path.relative_to(SFT)) for path in SFT.rglob("*") if path.is_file()}
    apart = {"tang_hw5/Tang_testing_data.json", "tang_hw5/Tang_testing_gt.txt"}
    assert names == set(REAL) | apart
    questions = SFT / "tang_hw5" / "Tang_testing_data.json"
    with pytest.raises(DataError, match=r"hold the response; its columns are instruction, input"):
        read(questions)
    source = SourceConfig([str(questions)])
    prompts = list(read_conversations(source, "s", RejectLog(None, 0.0), prompts=True))
    assert len(prompts) == 15
    assert all(len(prompt.conversation.messages) == 1 for prompt in prompts)


@needs_data
def test_known_defects_are_named_with_their_rows(tmp_path: Path) -> None:
    log = RejectLog(tmp_path / "rejected.jsonl", max_bad_row_share=0.01)
    read(SFT / "stanford_alpaca" / "alpaca_5000.json", log)
    rows = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    # The data's README counts from 0.
    assert [(row["row"] - 1, row["reason"]) for row in rows] == [
        (2335, "the answer is empty (column 'output')"),
        (4658, "the answer is empty (column 'output')"),
    ]


@needs_data
def test_real_tools_thoughts_and_history() -> None:
    folder = SFT / "llama_factory"
    rows = read(folder / "reason_tool_use_demo_50.jsonl")
    answers = [m for row in rows for m in row.conversation.messages if m.role == "assistant"]
    assert all(answer.reasoning for answer in answers)
    assert sum(len(answer.tool_calls) for answer in answers) == 41 + 9 * 2 + 3 * 3
    assert sum(bool(row.conversation.tools) for row in rows) == 48  # two declare []
    turns = [len(row.conversation.messages) for row in read(folder / "examples_history.json")]
    assert turns == [6, 6]


def as_table(rows: list[dict[str, Any]], path: Path, kind: str) -> Path:
    table = pa.Table.from_pylist(rows)
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_with_nested_columns_read_as_json_does(kind: str, tmp_path: Path) -> None:
    other = {"function": {"name": "time", "arguments": {"zone": "UTC"}}}
    rows = [{"messages": chat} for chat in CHATS]
    rows += [{"messages": [*CHATS[0], CHATS[0][0], {"role": "assistant", "tool_calls": [other]}]}]
    plain = tmp_path / "a.jsonl"
    plain.write_text("\n".join(map(json.dumps, rows)))
    table = as_table(rows, tmp_path / f"a.{kind}", kind)
    found = [example.conversation for example in read(table)]
    assert found == [example.conversation for example in read(plain)]
    assert found[1].messages[1].tool_calls[0]["arguments"] == {"city": "台北"}


def test_folder_of_datasets(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"問題": ["甲", "乙"], "答案": ["一", None]}).save_to_disk(
        tmp_path / "d"
    )
    log = RejectLog(None, max_bad_row_share=0.5)
    assert len(read(tmp_path / "d", log)) == 1
    assert log.last is not None and "the answer is empty" in log.last.reason


def test_bad_bytes_in_a_table_spoil_one_record(tmp_path: Path) -> None:
    values = pa.array([b"\xe7\x94\xb2", b"\xff", b"x"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, values.buffers())
    pq.write_table(pa.table({"prompt": text, "response": ["a", "b", "c"]}), tmp_path / "a.parquet")
    log = RejectLog(None, max_bad_row_share=1.0)
    assert [example.row for example in read(tmp_path / "a.parquet", log)] == [1, 3]
    assert log.last is not None and "invalid UTF-8: byte 0xff" in log.last.reason


def test_rows_of_all_kinds_add_up(tmp_path: Path) -> None:
    good = {"instruction": "問", "output": "答"}
    lines = [
        good,
        {**good, "output": ""},
        ["x"],
        good,
        {"instruction": "問"},
        {**good, "input": "補"},
    ]
    path = tmp_path / "rows.json"  # JSON Lines under another name
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n{broken")
    log, remarks = RejectLog(tmp_path / "rejected.jsonl", 1.0), Remarks()
    examples = read(path, log, remarks)
    assert [example.row for example in examples] == [1, 7, 11]
    assert (log.num_read, log.num_accepted, log.num_rejected) == (7, 3, 4)
    assert remarks.counts == {"duplicates": 1}
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [(row["file"], row["row"]) for row in rejected] == [
        (str(path), n) for n in (3, 5, 9, 12)
    ]
    with pytest.raises(DataError, match=r"4 of 7 rows rejected.*rows.json:12: malformed JSON"):
        read(path, RejectLog(None, 0.5))


def test_csv_of_messages_with_a_blank_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    with gzip.open(path, "wt", encoding="utf-8-sig", newline="") as file:
        file.write("\r\n")
        csv.writer(file).writerows([["id", "messages"], ["1", json.dumps(CHATS[1])]])
    assert len(read(path)[0].conversation.messages) == 4


NAMES = st.sampled_from(
    (
        *("role", "from", "content", "value", "type", "text", "tool_calls", "function", "name"),
        *("arguments", "messages", "conversations", "instruction", "input", "output", "history"),
        *("system", "tools", "weight", "context", "question", "answers", "data", "paragraphs"),
        *("qas", "instances", "images", "id"),
    )
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
ROLE = st.sampled_from(("user", "assistant", "human", "gpt", "tool", "function_call", "system"))
MESSAGE = st.dictionaries(NAMES, JSON, max_size=4).flatmap(
    lambda extra: ROLE.map(lambda role: {"content": "x", **extra, "role": role})
)
RECORD = st.dictionaries(NAMES, JSON, max_size=6) | st.lists(MESSAGE, max_size=5).map(
    lambda turns: {"messages": turns}
)
LAYOUTS = [
    Layout("messages", (("messages", "messages"), ("system", "system"), ("tools", "tools"))),
    Layout("alpaca", (("history", "history"), ("prompt", "input"), ("response", "output"))),
    Layout("squad", (("context", "context"), ("prompt", "question"), ("response", "answers"))),
]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(RECORD, st.sampled_from(LAYOUTS))
def test_any_record_is_a_conversation_or_a_reason(record: dict[str, Any], layout: Layout) -> None:
    try:
        conversation = read_conversation(record, layout)
    except RowError as error:
        assert str(error)
    else:
        assert conversation.messages[-1].role == "assistant"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    content=st.binary(max_size=200)
    | st.lists(RECORD | JSON, max_size=4).map(lambda rows: json.dumps(rows).encode())
    | st.lists(RECORD | JSON, max_size=4).map(lambda x: "\n".join(map(json.dumps, x)).encode()),
    extension=st.sampled_from(("json", "jsonl", "csv", "tsv", "xlsx", "xls", "parquet", "arrow")),
    magic=st.sampled_from(
        (b"", b"PK\x03\x04", b"PAR1", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", b"\x1f\x8b")
    ),
)
def test_any_file_is_read_or_refused(
    content: bytes, extension: str, magic: bytes, folder: Path
) -> None:
    path = folder / f"a.{extension}"
    path.write_bytes(magic + content)
    log = RejectLog(None, max_bad_row_share=1.0)
    try:
        examples = read(path, log)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert len(examples) == log.num_accepted == log.num_read - log.num_rejected


def test_walking_yields_one_row_for_each_reject_or_conversation(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "問", "output": "答"}\n{\n')
    source = SourceConfig([str(path)])
    rows = list(walk_conversations(path, source, find_layout(path, source)))
    assert [row.number for row in rows] == [1, 2]
    assert all(isinstance(row.value, bytes) for row in rows)  # not parsed by who passes over them
