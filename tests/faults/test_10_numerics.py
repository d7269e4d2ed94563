"""Row 10: losses and gradients that are not finite, and spikes, under every policy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_support import read_masters, run_scenarios

from trainer.engine.committed import list_steps

Vary = Callable[..., dict[str, Any]]
pytestmark = [pytest.mark.slow, pytest.mark.faults(row=10)]
WAYS = {
    "0 fp32": {},
    "0 bf16": {"engine__precision": "bf16"},
    "1 fp32": {"engine__zero_stage": 1},
    "1 bf16": {"engine__zero_stage": 1, "engine__precision": "bf16"},
    "2 bf16": {"engine__zero_stage": 2, "engine__precision": "bf16"},
    "2 fp32": {"engine__zero_stage": 2},
    "2 fp32 cpu": {"engine__zero_stage": 2, "engine__offload_optimizer": "cpu"},
    "3 fp32": {"engine__zero_stage": 3},
    "3 bf16 cpu": {
        "engine__zero_stage": 3,
        "engine__precision": "bf16",
        "engine__offload_optimizer": "cpu",
    },
}
WRONG = ("nan_at", "nan_gradient_at")


def last_state(run_dir: Path) -> dict[str, Any]:
    path = list_steps(run_dir / "checkpoints")[0]
    return json.loads((path / "manifest.json").read_text())["state"]


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = map(json.loads, lines)
    return [r for r in records if r["split"] == "event" and r["event"] == name]


def assert_same_end(left: Path, right: Path) -> None:
    """Compare masters, moments and Adam's counter bit for bit."""
    ours, theirs = (list_steps(run / "checkpoints")[0] for run in (left, right))
    for file in sorted(ours.glob("rank_*.safetensors")):
        assert file.read_bytes() == (theirs / file.name).read_bytes(), (left.name, file.name)
    assert last_state(left)["adam_step"] == last_state(right)["adam_step"]


def test_a_skipped_step_leaves_everything_as_it_was(vary: Vary, tmp_path: Path) -> None:
    scenarios = []
    for way, changes in WAYS.items():
        for twist in (*WRONG, "no_update_at"):
            config = vary(tmp_path / way / twist, **changes)
            config["guard"] = {"non_finite": "skip"}
            scenarios.append({"config": config, twist: 2})
    done = run_scenarios(scenarios, 2, tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    for way in WAYS:
        for twist in WRONG:
            assert_same_end(tmp_path / way / twist, tmp_path / way / "no_update_at")
            [skip] = events(tmp_path / way / twist, "skip")
            assert skip["skipped"] == 3 and len(skip["rows"]) == 2 and all(skip["rows"])
            assert ("rows" in skip["why"]) == (twist == "nan_at")
        assert last_state(tmp_path / way / "nan_at")["adam_step"] == 4
        masters = read_masters(tmp_path / way / "nan_at")
        assert all(torch.isfinite(value).all() for value in masters.values())
