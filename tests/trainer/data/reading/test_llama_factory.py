"""LLaMA-Factory's data folders, unchanged: entries, columns, tags, and what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.config import SourceConfig
from trainer.data.chats.conversation import Message
from trainer.data.chats.conversations import (
    find_layout,
    read_conversations,
    walk_conversations,
)
from trainer.data.chats.preferences import read_preferences
from trainer.data.reading.files import list_files
from trainer.data.reading.llama_factory import parse_entry, read_entries
from trainer.data.reading.records import RejectLog, parse_record
from trainer.errors import DataError

SHARED = Path(__file__).resolve().parents[5] / "shared" / "data"
CONFIGS = SHARED / "llama_factory_configs"
needs_data = pytest.mark.skipif(not SHARED.exists(), reason=f"no real data at {SHARED}")


def write_folder(folder: Path, info: object, **files: object) -> Path:
    (folder / "dataset_info.json").write_text(json.dumps(info, ensure_ascii=False))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False))
    return folder


def read(folder: Path, *datasets: str, **options: Any) -> list[list[tuple[str, str]]]:
    source = SourceConfig([str(folder)], datasets=list(datasets), **options)
    examples = read_conversations(source, "s", RejectLog(None, max_bad_row_share=0.0))
    return [[(m.role, m.content) for m in example.conversation.messages] for example in examples]


def test_columns_and_tags_are_honoured(tmp_path: Path) -> None:
    info = {
        "qa": {"file_name": "qa.json", "columns": {"prompt": "input", "response": "target"}},
        "chat": {
            "file_name": "chat.json",
            "formatting": "sharegpt",
            "columns": {"messages": "talk", "system": "rules"},
            "tags": {
                "role_tag": "who",
                "content_tag": "what",
                "user_tag": "顧客",
                "assistant_tag": "客服",
            },
        },
        "openai": {"file_name": "openai.json", "formatting": "openai"},
    }
    talk = [{"who": "顧客", "what": "在嗎"}, {"who": "客服", "what": "在"}]
    write_folder(
        tmp_path,
        info,
        qa=[{"input": "問", "target": "答", "output": "別的", "history": [["x", "y"]]}],
        chat=[{"talk": talk, "rules": "有禮"}],
        openai=[
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        ],
    )
    asked = [("user", "問"), ("assistant", "答")]  # columns that the entry leaves out are not read
    answered = [("system", "有禮"), ("user", "在嗎"), ("assistant", "在")]
    assert read(tmp_path, "chat", "qa") == [answered, asked]
    assert read(tmp_path / "dataset_info.json", "qa") == [asked]
    assert read(tmp_path, "openai") == [[("user", "a"), ("assistant", "b")]]


def test_entry_may_name_columns_that_the_file_lacks(tmp_path: Path) -> None:
    columns = {"prompt": "instruction", "query": "", "response": "output", "history": "history"}
    info = {"old": {"file_name": "old.json", "columns": columns, "file_sha1": "0"}}
    write_folder(tmp_path, info, old=[{"instruction": "問", "input": "x", "output": "答"}])
    assert read(tmp_path, "old") == [[("user", "問"), ("assistant", "答")]]


def test_entry_without_columns_is_guessed_and_a_folder_is_read_whole(tmp_path: Path) -> None:
    write_folder(tmp_path, {"many": {"file_name": "parts"}})
    (tmp_path / "parts").mkdir()
    for name in "ab":
        (tmp_path / "parts" / f"{name}.jsonl").write_text('{"instruction": "問", "output": "答"}')
    assert read(tmp_path, "many") == [[("user", "問"), ("assistant", "答")]] * 2


def test_num_samples_are_the_first_rows(tmp_path: Path) -> None:
    rows = [{"instruction": str(i), "output": "答"} for i in range(9)]
    write_folder(tmp_path, {"few": {"file_name": "few.json", "num_samples": 2}}, few=rows)
    assert [turns[0][1] for turns in read(tmp_path, "few")] == ["0", "1"]
    source = SourceConfig([str(tmp_path)], datasets=["few"])
    assert find_layout(tmp_path / "few.json", source).describe().endswith("first 2 rows")


def test_dataset_info_is_no_data_file(tmp_path: Path) -> None:
    write_folder(tmp_path, {}, qa=[{"instruction": "問", "output": "答"}])
    assert list_files(SourceConfig([str(tmp_path)])) == [tmp_path / "qa.json"]


ENTRIES: dict[str, dict[str, Any]] = {
    r"download org/set on huggingface.co or o/s on modelscope.cn, subset en, split test, put": {
        "hf_hub_url": "org/set",
        "ms_hub_url": "o/s",
        "subset": "en",
        "split": "test",
    },
    "its file .*absent.json does not exist": {"file_name": "absent.json"},
    "names neither a file nor a hub": {"script_url": "x"},
    "holds images; only text": {"file_name": "qa.json", "columns": {"images": "images"}},
    "holds preferences": {"file_name": "qa.json", "ranking": True},
    "holds preferences, which": {
        "file_name": "qa.json",
        "columns": {"prompt": "instruction", "response": "output", "kto_tag": "label"},
    },
    "names no response column: it is a text for pretraining": {
        "file_name": "qa.json",
        "columns": {"prompt": "text"},
    },
    "unknown formatting 'poem'": {"file_name": "qa.json", "formatting": "poem"},
    "num_samples='all' is no number": {"file_name": "qa.json", "num_samples": "all"},
    "no column 'ask', which columns.prompt names": {
        "file_name": "qa.json",
        "columns": {"prompt": "ask", "response": "output"},
    },
}


@pytest.mark.parametrize("reason", ENTRIES)
def test_what_an_entry_cannot_be(reason: str, tmp_path: Path) -> None:
    write_folder(tmp_path, {"x": ENTRIES[reason]}, qa=[{"instruction": "問", "output": "答"}])
    with pytest.raises(DataError, match=reason):
        read(tmp_path, "x")


def test_wrong_names_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset_info\.json does not exist"):
        read(tmp_path, "x")
    write_folder(tmp_path, {"alpaca": {"file_name": "a.json"}, "far": {"hf_hub_url": "a/b"}})
    with pytest.raises(DataError, match=r"no dataset 'alpacca' .*did you mean alpaca"):
        read(tmp_path, "alpacca")
    for content in ("[]", "{"):
        (tmp_path / "dataset_info.json").write_text(content)
        with pytest.raises(DataError, match=r"not an object of datasets|cannot be read as JSON"):
            read(tmp_path, "x")
    two = SourceConfig([str(tmp_path), str(tmp_path)], datasets=["x"])
    with pytest.raises(DataError, match="needs exactly one folder"):
        list_files(two)


def test_one_file_read_in_two_ways_needs_two_sources(tmp_path: Path) -> None:
    info = {
        "a": {"file_name": "qa.json"},
        "b": {"file_name": "qa.json", "num_samples": 1},
        "c": {"file_name": "qa.json"},
    }
    write_folder(tmp_path, info, qa=[{"instruction": "問", "output": "答"}])
    assert len(read(tmp_path, "a", "c")) == 1  # the same file twice is once
    with pytest.raises(DataError, match=r"'a' and 'b' read .*qa.json in different ways"):
        read(tmp_path, "a", "b")


@needs_data
@pytest.mark.parametrize(
    ("info", "num_rows"),
    [
        (
            "dataset_info.json",
            {
                "identity": 91,
                "alpaca_en_demo": 999,
                "alpaca_zh_demo": 1000,
                "glaive_toolcall_en_demo": 300,
                "glaive_toolcall_zh_demo": 298,  # two hold a result without a call
            },
        ),
        ("dataset_info_2024-05-02.json", {"identity": 91}),
    ],
)
def test_real_folder_with_real_descriptions(info: str, num_rows: dict[str, int]) -> None:
    source = SourceConfig(
        [str(SHARED / "sft" / "llama_factory")],
        datasets=list(num_rows),
        dataset_info=str(CONFIGS / info),
    )
    counted: dict[str, int] = dict.fromkeys(num_rows, 0)
    log = RejectLog(None, max_bad_row_share=0.01)
    for example in read_conversations(source, "s", log):
        counted[Path(example.file).stem] += 1
    assert counted == num_rows
    assert log.num_read == log.num_accepted + log.num_rejected


@needs_data
@pytest.mark.parametrize(
    ("info", "num_entries", "num_local"),
    [
        ("dataset_info.json", 104, 5),
        ("dataset_info_2024-05-02.json", 71, 1),
        ("dataset_info_2023-08-01.json", 35, 0),
    ],
)
def test_every_real_entry_is_read_or_explained(info: str, num_entries: int, num_local: int) -> None:
    folder = SHARED / "sft" / "llama_factory"
    described = json.loads((CONFIGS / info).read_text())
    assert len(described) == num_entries
    readable, reasons = [], []
    for name, value in described.items():
        try:
            readable.append(parse_entry(name, value, folder, CONFIGS / info))
        except DataError as error:
            reasons.append(str(error))
    assert len(readable) == num_local
    remedies = (
        "download",
        "does not exist",
        "only text",
        "pretraining",
        "file_name",
    )
    assert all(any(remedy in reason for remedy in remedies) for reason in reasons)
    listed = SourceConfig([str(folder)], datasets=["nope"], dataset_info=str(CONFIGS / info))
    with pytest.raises(DataError, match=r"no dataset 'nope'"):
        read_entries(listed)


@needs_data
@pytest.mark.parametrize(
    ("info", "name", "num_rows", "kind"),
    [
        ("dataset_info.json", "dpo_en_demo", 300, "pairs (messages)"),
        ("dataset_info.json", "dpo_zh_demo", 300, "pairs (messages)"),
        ("dataset_info.json", "kto_en_demo", 300, "labels"),
        ("dataset_info_2024-05-02.json", "oaast_rm_zh", 775, "ranked"),
    ],
)
def test_real_entries_of_preferences(info: str, name: str, num_rows: int, kind: str) -> None:
    folder = SHARED / "preference" / "llama_factory"
    source = SourceConfig([str(folder)], datasets=[name], dataset_info=str(CONFIGS / info))
    (path,) = list_files(source)
    layout = find_layout(path, source, "preferences")
    assert layout.describe().startswith(f"{kind}; ")
    rows = [parse_record(row.value) for row in walk_conversations(path, source, layout)]
    assert len(rows) == num_rows and read_preferences(rows[0], layout)[0]
    with pytest.raises(DataError, match=f"dataset '{name}' holds preferences, which are no"):
        find_layout(path, source)


def test_entries_of_preferences_name_their_columns(tmp_path: Path) -> None:
    info = {
        "pairs": {
            "file_name": "qa.json",
            "ranking": True,
            "columns": {"prompt": "ask", "chosen": "x", "rejected": "y"},
        },
        "labels": {
            "file_name": "qa.json",
            "columns": {"prompt": "ask", "response": "x", "kto_tag": "fine"},
        },
        "missing": {
            "file_name": "qa.json",
            "ranking": True,
            "columns": {"prompt": "ask", "chosen": "x", "rejected": "z"},
        },
        "chats": {"file_name": "qa.json", "columns": {"prompt": "ask", "response": "x"}},
    }
    row = {"ask": "問", "x": "好", "y": "壞", "chosen": "別的", "rejected": "其他", "fine": True}
    write_folder(tmp_path, info, qa=[row])

    def read_as(name: str) -> list[tuple[str, Message | None, Message | None]]:
        source = SourceConfig([str(tmp_path)], datasets=[name])
        layout = find_layout(tmp_path / "qa.json", source, "preferences")
        found, _ = read_preferences(row, layout)
        return [(p.prompt.messages[-1].content, p.chosen, p.rejected) for p in found]

    good, bad = Message("assistant", "好"), Message("assistant", "壞")
    assert read_as("pairs") == [("問", good, bad)]
    assert read_as("labels") == [("問", good, None)]
    for name in ("missing", "chats"):
        with pytest.raises(DataError, match="holds no preferences"):
            read_as(name)
