"""Training goes on after a rollout, or one that failed, as if there had been none."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_support import largest_difference, read_losses, read_masters, run_scenarios
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

# Under what a model is trained. Parameters as small as these stay whole under ZeRO-3 unless all are
# split on purpose, which the first group does.
SPLIT: dict[str, dict[str, Any]] = {
    "zero0": {"engine": {"zero_stage": 0}},
    "zero2": {"engine": {"zero_stage": 2}},
    "zero3": {"engine": {"zero_stage": 3}},
    "offload": {
        "engine": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_params": "cpu"},
    },
    "lora": {
        "engine": {"zero_stage": 3, "activation_checkpointing": True},
        "peft": {"mode": "lora", "rank": 4},
    },
    "qlora": {"engine": {"zero_stage": 3}, "peft": {"mode": "qlora", "rank": 4}},
}
WHOLE: dict[str, dict[str, Any]] = {
    "zero1": {"engine": {"zero_stage": 1}},
    "zero3_whole": {"engine": {"zero_stage": 3}},
    "lora2": {"engine": {"zero_stage": 2}, "peft": {"mode": "lora", "rank": 4}},
}
NUM_STEPS = 3


@pytest.fixture(scope="module")
def base(base_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose weights are as large as trained ones."""
    folder = tmp_path_factory.mktemp("base")
    architecture = base_config["model"]["architecture"]
    config = AutoConfig.for_model(**architecture, vocab_size=448, initializer_range=0.15)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_config["tokenizer"]["path"]).save_pretrained(folder)
    return folder


def make_scenario(
    base_config: dict[str, Any], base: Path, run_dir: Path, changes: dict[str, Any]
) -> dict[str, Any]:
    """Return the scenario of a short run."""
    config = copy.deepcopy(base_config)
    config["run_dir"] = str(run_dir)
    config["model"] = {"name": "base", "path": str(base)}
    config["tokenizer"]["path"] = None
    config["loop"] |= {"max_steps": NUM_STEPS, "global_batch_tokens": 96 * 8}
    config["optim"]["lr"] = 1e-2
    for section, values in changes.items():
        config[section] |= values
    return {"config": config}


Train = Callable[[dict[str, dict[str, Any]], dict[str, Any]], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the runs are."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def train(base_config: dict[str, Any], base: Path, folder: Path) -> Train:
    """Return a function that trains a group twice, with and without rollouts, on two ranks."""

    def train_group(group: dict[str, dict[str, Any]], twist: dict[str, Any]) -> None:
        scenarios = []
        for name, changes in group.items():
            for end, rollout in (("", False), ("_rollout", True)):
                scenario = make_scenario(base_config, base, folder / f"{name}{end}", changes)
                scenarios.append(scenario | twist | {"rollout": rollout})
        done = run_scenarios(scenarios, 2, folder)
        assert done.returncode == 0, done.stdout[-5000:]

    return train_group


@pytest.fixture(scope="module")
def split(train: Train, cpu_adam: None) -> None:
    """Train the first group."""
    train(SPLIT, {"split_everything": True})


@pytest.fixture(scope="module")
def whole(train: Train) -> None:
    """Train the second group."""
    train(WHOLE, {})


def check_training(plain: Path, other: Path) -> None:
    """Compare losses and weights, to the last bit."""
    losses = read_losses(plain)
    assert len(set(losses.values())) == NUM_STEPS
    assert read_losses(other) == losses
    assert largest_difference(read_masters(plain), read_masters(other)) == 0.0


@pytest.mark.parametrize("name", SPLIT)
def test_training_goes_on_as_without_rollouts(split: None, folder: Path, name: str) -> None:
    check_training(folder / name, folder / f"{name}_rollout")


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_training_goes_on_also_where_weights_stay_whole(
    whole: None, folder: Path, name: str
) -> None:
    check_training(folder / name, folder / f"{name}_rollout")


@pytest.mark.parametrize("name", ["zero2", "zero3", "offload"])
def test_answers_are_those_of_the_whole_model(split: None, folder: Path, name: str) -> None:
    answers = read_answers(folder / "zero0_rollout", 0)
    assert read_answers(folder / f"{name}_rollout", 0) == answers
    # The second rank answered fewer prompts, numbered the same.
    others = read_answers(folder / f"{name}_rollout", 1)
    assert others == [[*step[:2], *step[4:6]] for step in answers]
    assert all(step[:4] != step[4:] for step in answers)
    assert answers[0][1] != answers[-1][1]  # what was learnt between is in the answers


def read_answers(run_dir: Path, rank: int) -> list[list[list[int]]]:
    """Return the answers of every step: greedy ones, then drawn ones."""
    lines = (run_dir / f"answers_{rank}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
