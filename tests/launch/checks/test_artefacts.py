"""Model folder, tokenizer and store."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launch.checks.artefacts import ArtefactFacts, find_gaps, find_tokenizer_gaps, judge
from launch.checks.probe import StoreFacts

FINE = ArtefactFacts(
    model="/m", tokenizer="/t", store_dir="/s", has_sources=True, store=StoreFacts(["web"])
)


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({}, "ok", ""),
        ({"model_lacks": ["config.json"]}, "error", "model.path=/m lacks config.json"),
        ({"store": StoreFacts([], ["web"])}, "warning", "data.store_dir=/s lacks web"),
        ({"store": StoreFacts(problem="no files")}, "error", "no files"),
        ({"wandb": "online", "internet": False}, "error", "log.wandb=online"),
        ({"wandb": "online", "internet": None}, "ok", ""),
        ({"wandb": "offline", "internet": False}, "ok", ""),
    ],
)
def test_judge(changes: dict[str, object], level: str, words: str) -> None:
    found = judge(replace(FINE, **changes))  # type: ignore[arg-type]
    bad = [f for f in found if f.level != "ok"]
    assert [f.level for f in bad] == ([] if level == "ok" else [level])
    assert words in " ".join(f"{f.what} {f.why}" for f in bad)


def test_a_missing_tokenizer_leaves_the_store_unknown() -> None:
    found = judge(replace(FINE, tokenizer_lacks=["/t"], store=StoreFacts()))
    assert [f.level for f in found] == ["ok", "error", "warning"]


def test_gaps_of_a_model_folder(tmp_path: Path) -> None:
    assert find_gaps(tmp_path / "absent") == [f"the folder {tmp_path / 'absent'}"]
    assert find_gaps(tmp_path) == ["config.json", "weights (*.safetensors)"]
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").touch()
    assert find_gaps(tmp_path) == ["model-2.safetensors"]
    (tmp_path / "model-2.safetensors").touch()
    assert find_gaps(tmp_path) == []


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": 5}', "[]"])
def test_a_broken_index_is_a_gap(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert find_gaps(tmp_path) == ["a readable model.safetensors.index.json"]


def test_gaps_of_a_tokenizer(tmp_path: Path) -> None:
    assert find_tokenizer_gaps(tmp_path / "x.model") == [str(tmp_path / "x.model")]
    assert "tokenizer.json" in find_tokenizer_gaps(tmp_path)[0]
    (tmp_path / "tokenizer.json").touch()
    assert find_tokenizer_gaps(tmp_path) == []


def test_open_files_with_keys_are_an_error() -> None:
    (finding,) = [f for f in judge(replace(FINE, open_files=["/h/.netrc"])) if f.level == "error"]
    assert "/h/.netrc is open" in finding.what and "chmod 600 /h/.netrc" in finding.remedy
