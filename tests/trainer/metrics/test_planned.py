"""A run's plan beside what it took, from a folder's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.metrics.history import load_run
from trainer.metrics.journal import encode_line
from trainer.metrics.meters import GIB
from trainer.metrics.planned import ComparedRow, compare_plan
from trainer.metrics.run_facts import read_run

PLAN = {
    "num_gpus": 4,
    "step_seconds": 2.0,
    "tokens_per_s": 5000.0,
    "peak_bytes": 20e9,
    "checkpoint_bytes": 1200,
    "hours": None,
    "gpu_hours": None,
}


def write_run(folder: Path, device: str, plan: dict[str, Any] | None) -> Path:
    """Write a run's folder: three steps of 9 (the first), 2.5 and 3.5 seconds."""
    (folder / "checkpoints/step_00000003").mkdir(parents=True)
    (folder / "checkpoints/step_00000003/rank_00000.safetensors").write_bytes(b"x" * 1500)
    (folder / "config.yaml").write_text("name: r\nloop: {max_steps: 3}\n")
    lines = [{"split": "event", "event": "environment", "step": 0, "time": 1e9, "device": device}]
    for step, seconds in enumerate((9.0, 2.5, 3.5), 1):
        figures = {"seconds": seconds, "tokens_per_s_overall": 4000.0, "memory_gib": 22e9 / GIB}
        lines.append({"split": "train", "step": step, "time": 1e9 + step, "loss": 1.0, **figures})
    (folder / "metrics.jsonl").write_bytes(b"".join(map(encode_line, lines)))
    (folder / "submit.json").write_text(json.dumps({"job_ids": ["7"], "plan": plan}))
    return folder


def compared(folder: Path, plan: dict[str, Any] | None = None) -> dict[str, ComparedRow]:
    rows = compare_plan(load_run(folder), read_run(folder), plan)
    return {row[0]: row for row in rows}


def test_plan_of_the_submission_is_compared(tmp_path: Path) -> None:
    rows = compared(write_run(tmp_path / "r", "cuda:0", PLAN))
    assert rows["Step"] == ("Step", "2 s", "3 s", "1.50")  # the first step, which warms up, is out
    assert rows["Tokens/s"][3] == "0.80"
    assert rows["Memory of a GPU"][1:] == ("20.00 GB", "22.00 GB", "1.10")
    assert rows["Checkpoint"][3] == "1.25"
    assert "Hours" not in rows  # neither planned nor known: the run's lives are not recorded


def test_memory_of_a_cpu_is_not_compared(tmp_path: Path) -> None:
    rows = compared(write_run(tmp_path / "r", "cpu", PLAN))
    assert rows["Memory of a GPU"] == ("Memory of a GPU", "20.00 GB", "", "")


def test_given_plan_stands_for_a_missing_one(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", "cpu", None)
    assert compared(folder) == {}
    assert compared(folder, {"step_seconds": 6.0})["Step"][3] == "0.50"


@pytest.mark.parametrize("measured", ["nan", "inf"])
def test_figures_that_are_no_numbers_are_unknown(tmp_path: Path, measured: str) -> None:
    folder = write_run(tmp_path / "r", "cuda:0", PLAN)
    journal = folder / "metrics.jsonl"
    journal.write_text(journal.read_text().replace("4000.0", f'"{measured}"'))
    assert compared(folder)["Tokens/s"][2] == ""
