"""Layouts guessed from headers in Chinese and English, and mappings that do not fit."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from trainer.config import SourceConfig
from trainer.data.chats.conversations import find_layout, read_conversations
from trainer.data.chats.layouts import Layout
from trainer.data.reading.columns import guess_columns
from trainer.data.reading.records import RejectLog
from trainer.errors import DataError

CHAT = [{"role": "user", "content": "問"}, {"role": "assistant", "content": "答"}]


def write_table(path: Path, header: list[str], *rows: list[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *(rows or [["甲"] * len(header)])])
    return path


def write_json(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text(json.dumps(records, ensure_ascii=False))
    return path


def layout_of(path: Path, **options: Any) -> Layout:
    return find_layout(path, SourceConfig([str(path)], **options))


def messages_of(path: Path, **options: Any) -> list[list[tuple[str, str]]]:
    source, log = SourceConfig([str(path)], **options), RejectLog(None, max_bad_row_share=0.0)
    examples = read_conversations(source, "s", log)
    return [[(m.role, m.content) for m in e.conversation.messages] for e in examples]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (["instruction", "input", "output"], {"prompt": 0, "query": 1, "response": 2}),
        (["output", "input", "instruction"], {"prompt": 2, "query": 1, "response": 0}),
        (["問題", "答案"], {"prompt": 0, "response": 1}),
        (["问题", "回答"], {"prompt": 0, "response": 1}),
        (["指令", "輸入", "輸出", "系統"], {"prompt": 0, "query": 1, "response": 2, "system": 3}),
        (["人設", "提問", "回覆"], {"system": 0, "prompt": 1, "response": 2}),
        (["Prompt", "Response"], {"prompt": 0, "response": 1}),
        ([" Question: ", "ANSWER*"], {"prompt": 0, "response": 1}),
        (["問題（必填）", "答 覆"], {"prompt": 0, "response": 1}),
        (["Ｑ", "Ａ"], {"prompt": 0, "response": 1}),
        (["編號", "客戶常見問題", "標準答案", "備註"], {"prompt": 1, "response": 2}),
        (["上下文", "問題", "答案"], {"context": 0, "prompt": 1, "response": 2}),
        (["input", "target"], {"prompt": 0, "response": 1}),
        (["inputs", "targets"], {"prompt": 0, "response": 1}),
        (["system_prompt", "question", "response"], {"system": 0, "prompt": 1, "response": 2}),
        (["conversations", "tools"], {"messages": 0, "tools": 1}),
        (["歷史對話", "问", "答"], {"history": 0, "prompt": 1, "response": 2}),
        (["問題一", "問題二", "答案"], {"response": 2}),  # two that could be: not guessed
        (["甲", "乙"], {}),
    ],
)
def test_guess(header: list[str], expected: dict[str, int]) -> None:
    assert guess_columns(header) == {name: header[at] for name, at in expected.items()}


def test_mapping_overrides_the_guess_and_an_empty_name_turns_a_column_off(tmp_path: Path) -> None:
    path = write_table(
        tmp_path / "a.csv", ["問題", "輸入", "答案", "正解"], ["問", "補", "錯", "對"]
    )
    assert messages_of(path) == [[("user", "問\n補"), ("assistant", "錯")]]
    columns = {"response": "正解", "query": ""}
    assert messages_of(path, columns=columns) == [[("user", "問"), ("assistant", "對")]]


def test_wrong_mappings_show_the_columns_found(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.csv", ["題幹", "解說", "備註"])
    with pytest.raises(
        DataError, match=r"hold the prompt and the response; its columns are 題幹, 解說"
    ):
        layout_of(path)
    with pytest.raises(
        DataError, match=r"no column '題目', which columns.prompt names; its columns are"
    ):
        layout_of(path, columns={"prompt": "題目", "response": "解說"})
    with pytest.raises(DataError, match=r"columns={promt: .*ours are .*did you mean prompt"):
        layout_of(path, columns={"promt": "題幹"})
    with pytest.raises(DataError, match=r"schema='alpacca' is not one of .*did you mean alpaca"):
        layout_of(path, schema="alpacca")
    with pytest.raises(DataError, match="hold the messages"):
        layout_of(path, schema="sharegpt")
    fitting = {"prompt": "題幹", "response": "解說"}
    assert layout_of(path, columns=fitting).column("response") == "解說"


def test_columns_of_one_name_and_of_none(tmp_path: Path) -> None:
    path = write_table(
        tmp_path / "a.csv", ["", "問題", "答案", "答案", ""], ["1", "問", "甲", "乙", "x"]
    )
    assert messages_of(path) == [[("user", "問"), ("assistant", "甲")]]
    columns = {"response": "答案.2"}
    assert messages_of(path, columns=columns) == [[("user", "問"), ("assistant", "乙")]]


def test_errors_show_some_of_very_many_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({str(i): {"question": "問"} for i in range(5000)}))
    with pytest.raises(DataError, match=r"its columns are 0, 1, .*29 and 4970 more\."):
        layout_of(path)
    with pytest.raises(DataError, match="a table needs a header line"):
        layout_of(write_table(tmp_path / "b.csv", ["黑潮多快？", "每秒一公尺。"]))


def test_layouts_are_plain_data_in_one_line(tmp_path: Path) -> None:
    layout = layout_of(write_table(tmp_path / "a.csv", ["問題", "答案"]))
    assert layout.describe() == "prompt_response; prompt=問題, response=答案; csv; utf-8"
    again = json.loads(json.dumps(asdict(layout)))
    assert again["columns"] == [["prompt", "問題"], ["response", "答案"]]


def test_schemas_are_told_by_what_columns_hold(tmp_path: Path) -> None:
    record: dict[str, Any] = {"messages": CHAT, "prompt": "問", "answer": "別的"}
    path = write_json(tmp_path / "a.json", record)
    assert layout_of(path).schema == "messages"
    assert messages_of(path, schema="prompt_response") == [[("user", "問"), ("assistant", "別的")]]
    shares = [{"from": "human", "value": "問"}, {"from": "gpt", "value": "答"}]
    path = write_json(tmp_path / "b.json", {"conversation": shares})
    assert layout_of(path).schema == "sharegpt"
    path = write_table(tmp_path / "c.csv", ["對話"], [json.dumps(CHAT)])
    assert messages_of(path) == [[("user", "問"), ("assistant", "答")]]
    path = write_table(tmp_path / "d.csv", ["對話", "問題", "答案"], ["閒聊", "問", "答"])
    assert layout_of(path).schema == "prompt_response"


def test_messages_under_any_name(tmp_path: Path) -> None:
    shares = [{"from": "human", "value": "問"}, {"from": "gpt", "value": "答"}]
    path = write_json(tmp_path / "a.json", {"id": 1, "items": shares, "scores": [{"by": "甲"}]})
    assert messages_of(path) == [[("user", "問"), ("assistant", "答")]]
    path = write_json(tmp_path / "b.json", {"first": shares, "second": shares})
    with pytest.raises(DataError, match="its columns are first, second"):
        layout_of(path)


def test_first_record_may_be_bad_or_lack_a_column(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{\n{"instruction": "一"}\n{"instruction": "問", "input": "", "output": "答"}\n'
    )
    layout = layout_of(path)
    assert layout.columns == (("prompt", "instruction"), ("query", "input"), ("response", "output"))
    path.write_text("{\n[\n")
    with pytest.raises(
        DataError, match=r"none of the first 2 rows can be read; the first: malformed"
    ):
        layout_of(path)


def test_preferences_are_not_taken_for_answers(tmp_path: Path) -> None:
    shares = [{"from": "human", "value": "問"}]
    pair = {"conversations": shares, "chosen": "好", "rejected": "壞"}
    with pytest.raises(DataError, match="holds preferences"):
        layout_of(write_json(tmp_path / "a.json", pair))
    with pytest.raises(DataError, match="marks answers as good or bad"):
        layout_of(write_json(tmp_path / "b.json", {"messages": CHAT, "label": False}))
    table = {"prompt": "問", "chosen": "好", "rejected": "壞"}
    columns = {"prompt": "prompt", "response": "chosen"}
    path = write_json(tmp_path / "c.json", table)
    assert messages_of(path, columns=columns) == [[("user", "問"), ("assistant", "好")]]


def test_nested_files(tmp_path: Path) -> None:
    paragraphs = [
        {"context": "文", "qas": [{"question": q, "answers": [{"text": q}]} for q in "甲乙"]}
    ]
    squad = [[("user", f"文\n\n{q}"), ("assistant", q)] for q in "甲乙"]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}] * 2}))
    assert messages_of(path) == squad * 2
    assert messages_of(write_json(tmp_path / "b.json", {"paragraphs": paragraphs})) == squad
    assert messages_of(write_json(tmp_path / "c.json", paragraphs[0])) == squad
    renamed = {"prompt": "context", "response": "question"}
    assert messages_of(path, columns=renamed)[0] == [("user", "文"), ("assistant", "甲")]
    rows = [{"問題": "問", "答案": "答"}] * 2
    path.write_text(json.dumps({"total": 2, "rows": rows}))
    assert messages_of(path) == [[("user", "問"), ("assistant", "答")]] * 2
    instances = [{"input": "一", "output": "1"}, {"input": "二", "output": "2"}]
    seed = {"instruction": "翻", "instances": instances}
    expected = [[("user", f"翻\n{i['input']}"), ("assistant", i["output"])] for i in instances]
    assert messages_of(write_json(tmp_path / "d.json", seed)) == expected


def test_plain_text_holds_no_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("問\t答")
    with pytest.raises(DataError, match="plain text, which holds no conversations"):
        layout_of(tmp_path / "a.txt")
