"""Row 16: a tokenizer that is not the model's is refused before the first step, with both sizes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tokenizer.load import load_tokenizer, num_ids, save_tokenizer
from tokenizer.pair import check_pair
from trainer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.faults(row=16)
FITTING_ROWS = 448


def make_model(folder: Path, config: dict[str, Any], rows: int, **ids: Any) -> Path:
    """Write a model folder without weights: what it is refused for is told by its config."""
    folder.mkdir(parents=True)
    values = config["model"]["architecture"] | {"vocab_size": rows, **ids}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ({"bos_token_id": 1, "eos_token_id": 2}, ""),
        ({"eos_token_id": [7, 2]}, ""),
        ({"bos_token_id": None, "eos_token_id": None}, ""),
        ({"eos_token_id": 7}, "eos_token_id=2 instead of 7"),
        (
            {"bos_token_id": 0, "eos_token_id": [7, 8]},
            "bos_token_id=1 instead of 0, eos_token_id=2",
        ),
    ],
)
def test_special_ids_are_compared_with_the_config(
    ids: dict[str, Any], words: str, base_config: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = base_config["tokenizer"]["path"]
    model = make_model(tmp_path / "model", base_config, FITTING_ROWS, **ids)
    if not words:
        check_pair(model, tokenizer)
        return
    with pytest.raises(ConfigError, match=f"{words}.*400 ids, the model 448 embedding rows"):
        check_pair(model, tokenizer)


def test_what_generation_ends_with_counts_too(base_config: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", base_config, FITTING_ROWS, eos_token_id=7)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    check_pair(model, base_config["tokenizer"]["path"])


def test_pieces_are_compared_with_the_models_own_tokenizer(
    base_config: dict[str, Any], tmp_path: Path
) -> None:
    path = Path(base_config["tokenizer"]["path"])
    model = make_model(tmp_path / "model", base_config, FITTING_ROWS)
    save_tokenizer(load_tokenizer(path), model)
    check_pair(model, path / "tokenizer.model")  # the same, from another file
    tokens = json.loads((path / "tokenizer.json").read_text())
    vocab = tokens["model"]["vocab"]
    first, second = (next(p for p, i in vocab.items() if i == n) for n in (350, 351))
    vocab[first], vocab[second] = vocab[second], vocab[first]
    other = tmp_path / "other"
    save_tokenizer(load_tokenizer(path), other)
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(ConfigError, match=r"2 pieces have other ids.*351 instead of 350.*400 ids"):
        check_pair(model, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fixture", "rows", "ids", "words"),
    [
        ("base_config", 300, {}, "the tokenizer has 400 ids, the model 300 embedding rows"),
        ("chat_config", FITTING_ROWS, {"eos_token_id": 9}, "eos_token_id=2 instead of 9"),
        ("preference_config", 300, {}, "the tokenizer has 400 ids, the model 300 embedding rows"),
        ("dpo_config", FITTING_ROWS, {"bos_token_id": 9}, "bos_token_id=1 instead of 9"),
    ],
    ids=["pretrain", "sft", "reward", "dpo"],
)
def test_run_refuses_before_its_first_step(
    fixture: str,
    rows: int,
    ids: dict[str, Any],
    words: str,
    request: pytest.FixtureRequest,
    base_config: dict[str, Any],
    tmp_path: Path,
) -> None:
    values = copy.deepcopy(request.getfixturevalue(fixture))
    assert num_ids(load_tokenizer(values["tokenizer"]["path"])) == 400
    model = make_model(tmp_path / "model", base_config, rows, **ids)
    values |= {"model": {"name": "start", "path": str(model)}, "run_dir": str(tmp_path / "run")}
    config = tmp_path / "asked.yaml"
    config.write_text(yaml.safe_dump(values))
    done = subprocess.run(
        [sys.executable, "-m", "launch", "run", "--config", str(config)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == ConfigError.exit_code, done.stdout + done.stderr
    assert words in done.stderr and "embedding rows" in done.stderr
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert "Traceback" not in done.stderr
