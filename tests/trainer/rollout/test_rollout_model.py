"""Training goes on after a rollout, or one that failed, as if there had been none."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_support import largest_difference, read_losses, read_masters, run_scenarios
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

# Under what a model is trained: (ZeRO stage, further changes). Parameters as small as these stay
# whole under ZeRO-3 unless "split" says otherwise.
SPLIT: dict[str, dict[str, Any]] = {
    "split": {"engine": {"zero_stage": 3}},
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
    f"zero{stage}": {"engine": {"zero_stage": stage}} for stage in range(4)
}


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
    """Return a scenario of four steps."""
    config = copy.deepcopy(base_config)
    config["run_dir"] = str(run_dir)
    config["model"] = {"name": "base", "path": str(base)}
    config["tokenizer"]["path"] = None
    config["loop"] |= {"max_steps": 4, "global_batch_tokens": 96 * 8}
    config["optim"]["lr"] = 1e-2
    for section, values in changes.items():
        config[section] |= values
    return {"config": config}


@pytest.fixture(scope="module")
def runs(
    base_config: dict[str, Any],
    base: Path,
    cpu_adam: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Train everything twice, with and without rollouts, on two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    for twist, group in (({"split_everything": True}, SPLIT), ({}, WHOLE)):
        scenarios = []
        for name, changes in group.items():
            for end, rollout in (("", False), ("_rollout", True)):
                scenario = make_scenario(base_config, base, folder / f"{name}{end}", changes)
                scenarios.append(scenario | twist | {"rollout": rollout})
        done = run_scenarios(scenarios, 2, folder)
        assert done.returncode == 0, done.stdout[-5000:]
    return folder


@pytest.mark.parametrize("name", [*SPLIT, *WHOLE])
def test_training_goes_on_as_without_rollouts(runs: Path, name: str) -> None:
    plain, other = runs / name, runs / f"{name}_rollout"
    losses = read_losses(plain)
    assert len(set(losses.values())) == 4
    assert read_losses(other) == losses
    assert largest_difference(read_masters(plain), read_masters(other)) == 0.0


@pytest.mark.parametrize("name", ["split", "offload", "zero1", "zero2", "zero3"])
def test_answers_are_those_of_the_whole_model(runs: Path, name: str) -> None:
    answers = read_answers(runs / "zero0_rollout", 0)
    assert read_answers(runs / f"{name}_rollout", 0) == answers
    # The second rank answered fewer prompts, numbered the same.
    assert read_answers(runs / f"{name}_rollout", 1) == [
        [*step[:2], *step[4:6]] for step in answers
    ]
    assert all(step[:4] != step[4:] for step in answers)
    assert answers[0][1] != answers[3][1]  # what was learnt between is in the answers


def read_answers(run_dir: Path, rank: int) -> list[list[list[int]]]:
    """Return the answers of every step: greedy ones, then drawn ones."""
    lines = (run_dir / f"answers_{rank}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
