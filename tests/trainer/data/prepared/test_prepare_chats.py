"""Conversations through preparation: the store, what is left out, resuming, and --check."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_tokenizers import sentencepiece_tokenizer
from rich.console import Console

from tokenizer.load import load_tokenizer, save_tokenizer
from trainer.config import DataConfig, SourceConfig
from trainer.data.chats.chat import encode_conversation, resolve_template
from trainer.data.chats.conversation import Conversation, Message
from trainer.data.prepared import prepare as preparation
from trainer.data.prepared.check import check
from trainer.data.prepared.prepare import ensure_prepared, open_store, plan_sources, prepare
from trainer.data.prepared.shards import Task
from trainer.data.prepared.store import SourceStore, hash_text
from trainer.data.prepared.summary import summarise
from trainer.data.prepared.workers import run_tasks
from trainer.errors import ConfigError, DataError

NUM_ROWS = 60
ROWS = [
    {"instruction": f"question {i} 海", "output": f"answer {i * 7919 % 1009} 流"}
    for i in range(NUM_ROWS)
]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(sentencepiece_tokenizer(), folder)
    return folder


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def make_data(folder: Path, *paths: Path, **changes: Any) -> DataConfig:
    options: dict[str, Any] = {
        "content": "conversations",
        "template": "chatml",
        "store_dir": str(folder / "store"),
        "num_processes": 1,
        "max_length": 256,
    }
    return DataConfig({"chats": SourceConfig([str(p) for p in paths])}, **(options | changes))


def only(data: DataConfig, tokenizer_path: Path) -> SourceStore:
    return prepare(data, tokenizer_path).sources["chats"]


def test_store_holds_ids_weights_and_learnt_lengths(tmp_path: Path, tokenizer_path: Path) -> None:
    source = only(make_data(tmp_path, write(tmp_path / "a.json", ROWS)), tokenizer_path)
    tokenizer = load_tokenizer(tokenizer_path)
    template = resolve_template(tokenizer, "chatml")
    assert source.weights is not None and source.weights.dtype == np.dtype("<f4")
    for i in (0, 17, NUM_ROWS - 1):
        question, answer = ROWS[i]["instruction"], ROWS[i]["output"]
        chat = Conversation((Message("user", question), Message("assistant", answer)))
        (expected,) = encode_conversation(tokenizer, chat, template=template).chats
        assert source.document(i).tolist() == expected.input_ids.tolist()
        assert source.document_weights(i).tolist() == expected.weights.tolist()  # type: ignore[union-attr]
        assert (source.num_chars[i], source.num_bytes[i]) == (len(answer), len(answer.encode()))
        assert source.text_hashes[i] == hash_text(question.encode())
    chats = source.manifest["chats"]
    assert chats["kept"] == chats["turns"] == NUM_ROWS
    assert chats["trained_tokens"] == int((np.asarray(source.weights) > 0).sum())


def test_one_question_is_on_one_side(tmp_path: Path, tokenizer_path: Path) -> None:
    rows = [{"instruction": f"q{i % 20}", "output": f"answer {i}"} for i in range(60)]
    data = make_data(tmp_path, write(tmp_path / "a.json", rows), holdout_share=0.4)
    source = only(data, tokenizer_path)
    sides = {True: set(), False: set()}
    for held_out, seen in sides.items():
        seen |= {int(i) % 20 for i in source.document_ids(held_out)}
    assert sides[True] and sides[False] and not sides[True] & sides[False]


def test_rows_add_up(tmp_path: Path, tokenizer_path: Path) -> None:
    rows = [
        *ROWS,
        ROWS[0],
        {"instruction": "no answer", "output": ""},
        {"instruction": "long", "output": "word " * 400},
        {"instruction": "spells", "output": "the end is </s>"},
    ]
    path = write(tmp_path / "a.json", rows)
    data = make_data(tmp_path, path, max_bad_row_share=0.1)
    source = only(data, tokenizer_path)
    manifest = source.manifest
    assert manifest["rows"] == {"read": len(rows), "rejected": 1, "short": 0}
    assert manifest["chats"]["long"] == 1
    kept = manifest["chats"]["kept"]
    assert kept + manifest["chats"]["long"] + manifest["rows"]["rejected"] == len(rows)
    assert manifest["lengths"]["duplicates"] == 1
    assert sum(manifest["lengths"]["up_to"].values()) == len(rows) - 1
    assert manifest["lengths"]["longest"] > 400
    assert manifest["chats"]["spells_control"] == 1
    listed = [json.loads(x) for x in (source.folder / "rejected.jsonl").read_text().splitlines()]
    assert sorted((x["row"], x["reason"].split(":")[0]) for x in listed) == [
        (NUM_ROWS + 2, "the answer is empty (column 'output')"),
        (NUM_ROWS + 3, "longer than data.max_length=256"),
    ]
    shown = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    shown.print(summarise(prepare(data, tokenizer_path), data), markup=False)
    text = shown.export_text()
    assert "1 conversations were left out: not one turn of them fits" in text
    assert "1 conversations spell a special token" in text


def test_a_run_that_prepares_says_what_is_left_out(
    tmp_path: Path, tokenizer_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*ROWS, {"instruction": "long", "output": "word " * 400}]
    data = make_data(tmp_path, write(tmp_path / "a.json", rows))
    store = ensure_prepared(data, tokenizer_path)
    listed = store.sources["chats"].folder / "rejected.jsonl"
    (said,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert "chats: 1 of 61 rows were left out; most often: longer than data.max_length=256" in said
    assert str(listed) in said and listed.exists()


def test_nothing_but_long_conversations(tmp_path: Path, tokenizer_path: Path) -> None:
    data = make_data(tmp_path, write(tmp_path / "a.json", ROWS), max_length=8)
    with pytest.raises(
        DataError, match=r"none of 60 rows became a conversation .* 60 longer than data\.max_leng"
    ) as caught:
        prepare(data, tokenizer_path)
    listed = Path(str(caught.value).rpartition(" ")[2])
    assert len(listed.read_text().splitlines()) == NUM_ROWS


def test_cut_conversations_are_counted(tmp_path: Path, tokenizer_path: Path) -> None:
    turns = [
        {"from": speaker, "value": f"{speaker} says {i}"}
        for i in range(8)
        for speaker in ("human", "gpt")
    ]
    path = write(tmp_path / "a.json", [{"conversations": turns}])
    source = only(make_data(tmp_path, path, max_length=128, max_bad_row_share=1), tokenizer_path)
    chats = source.manifest["chats"]
    assert (chats["kept"], chats["turns"], chats["cut"]) == (1, 8, 1)
    assert 0 < chats["turns_cut"] < 8 and len(source.tokens) <= 128
    assert source.manifest["lengths"]["longest"] > 128


def test_key_follows_what_decides_the_encoding(tmp_path: Path, tokenizer_path: Path) -> None:
    data = make_data(tmp_path, write(tmp_path / "a.json", ROWS))

    def key(**changes: Any) -> str:
        return plan_sources(dataclasses.replace(data, **changes), tokenizer_path)[0].key

    keys = [
        key(),
        key(template="alpaca"),
        key(train_on="last"),
        key(system="S"),
        key(max_length=128),
    ]
    assert len(set(keys)) == len(keys)
    assert key(holdout_share=0.5) == key(min_chars=9) == keys[0]
    source = dataclasses.replace(
        data.sources["chats"], columns={"prompt": "output", "response": "instruction"}
    )
    assert key(sources={"chats": source}) != keys[0]


def test_a_killed_preparation_goes_on(tmp_path: Path, tokenizer_path: Path) -> None:
    path = write(tmp_path / "a.json", ROWS)
    whole = only(make_data(tmp_path / "one", path), tokenizer_path)
    data = make_data(tmp_path / "two", path)
    (plan,) = plan_sources(data, tokenizer_path)
    plan.work_folder.mkdir(parents=True)
    spec = preparation.describe_encoder(data, tokenizer_path)
    run_tasks([Task(plan, 0, 0, 1, 0.01)], spec, 1)
    (shard,) = plan.work_folder.glob("*.npz")
    made = shard.stat().st_mtime_ns
    stamps = []

    def note(*_: Any) -> None:
        stamps.append(shard.stat().st_mtime_ns)

    original = preparation.commit_source
    preparation.commit_source = lambda *a: (note(), original(*a))[1]  # type: ignore[assignment]
    try:
        again = only(data, tokenizer_path)
    finally:
        preparation.commit_source = original
    assert stamps == [made]  # the shard was used, not made again
    for name in ("tokens", "weights"):
        assert np.array_equal(getattr(again, name), getattr(whole, name))
    assert not plan.work_folder.exists()


def test_processes_make_the_same_store(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.data.prepared.workers.BYTES_PER_PROCESS", 1 << 10)
    paths = [write(tmp_path / f"{n}.json", ROWS[n * 20 : n * 20 + 20]) for n in range(3)]
    stores = [
        only(make_data(tmp_path / str(num), *paths, num_processes=num), tokenizer_path)
        for num in (1, 2)
    ]
    assert stores[0].manifest["arrays"] == stores[1].manifest["arrays"]


def test_template_that_does_not_fit_stops_before_reading(
    tmp_path: Path, tokenizer_path: Path
) -> None:
    data = make_data(tmp_path, write(tmp_path / "a.json", ROWS), template="auto")
    with pytest.raises(ConfigError, match=r"data\.template=auto"):
        ensure_prepared(data, tokenizer_path)
    with pytest.raises(DataError, match="kuroshio prepare"):
        open_store(dataclasses.replace(data, template="chatml"), tokenizer_path)


def report_of(data: DataConfig, tokenizer_path: Path, tmp_path: Path) -> tuple[str, list[str]]:
    found = check(data, tokenizer_path)
    console = Console(width=160, record=True, file=(tmp_path / "report").open("w"))
    console.print(found.report, markup=False)
    return console.export_text(), found.problems


def test_check_tells_and_keeps_only_the_list(tmp_path: Path, tokenizer_path: Path) -> None:
    rows = [*ROWS, {"instruction": "no answer", "output": ""}]
    data = make_data(tmp_path, write(tmp_path / "a.json", rows), max_bad_row_share=0.1)
    text, problems = report_of(data, tokenizer_path, tmp_path)
    assert problems == []
    assert "a.json: alpaca; prompt=instruction, response=output; json; utf-8" in text
    assert "left out 1 times: the answer is empty" in text
    assert "█" in text and "data.max_length=256" in text
    assert "<|im_start|>assistant\n⟦answer 0 流<|im_end|>⟧\n" in text
    kept = [p.name for p in (tmp_path / "store").iterdir()]
    assert kept == ["chats.rejected.jsonl"]
    assert json.loads((tmp_path / "store" / kept[0]).read_text())["row"] == NUM_ROWS + 1
    long = [{"instruction": "long", "output": "word " * (400 + i)} for i in range(2)]
    more = make_data(tmp_path, write(tmp_path / "b.json", ROWS + long))
    assert "left out 2 times, for example: longer than" in report_of(
        more, tokenizer_path, tmp_path
    )[0].replace("\n", " ")
    strict = dataclasses.replace(data, max_bad_row_share=0.01)
    text, (problem,) = report_of(strict, tokenizer_path, tmp_path)
    assert "alpaca" in text
    assert problem.startswith("chats: 1 of 61 rows rejected, 1.64%, above data.max_bad_row_share")
    assert str(tmp_path / "store" / "chats.rejected.jsonl") in problem


def test_check_reports_every_source(tmp_path: Path, tokenizer_path: Path) -> None:
    good = SourceConfig([str(write(tmp_path / "good.json", ROWS))])
    bad = SourceConfig([str(write(tmp_path / "bad.json", [{"x": 1}, {"x": 2}]))])
    long = SourceConfig(
        [str(write(tmp_path / "long.json", [{"instruction": "q", "output": "w " * 999}]))]
    )
    data = dataclasses.replace(
        make_data(tmp_path), sources={"bad": bad, "long": long, "good": good}
    )
    text, problems = report_of(data, tokenizer_path, tmp_path)
    assert "good" in text and "answer 0" in text
    assert [problem.partition(":")[0] for problem in problems] == ["bad", "long"]
    listed = Path(problems[1].rpartition(" ")[2])
    assert listed == tmp_path / "store" / "long.rejected.jsonl" and listed.exists()


def test_check_of_documents(tmp_path: Path, tokenizer_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    texts = [*(f"text number {i}" for i in range(30)), "text number 0"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "{}\n")
    data = make_data(tmp_path, path, content="documents", max_bad_row_share=0.1)
    text, problems = report_of(data, tokenizer_path, tmp_path)
    assert problems == [] and "texts.jsonl" in text
    assert "left out 1 times: no column 'text'" in text
    (row,) = [line.split() for line in text.splitlines() if line.startswith("chats ")]
    assert row[1] == "31" and row[-3:] == ["1", "1", "32"]  # documents; rejected, twice, rows
