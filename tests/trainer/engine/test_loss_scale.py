"""fp16's loss scale leaves no trace in gradients, norms and moments, also where it grows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_support import run_scenarios


def read_norms(run_dir: Path) -> tuple[list[float], list[float]]:
    """Return gradient norms and loss scales by step."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    records = [line for line in lines if line["split"] == "train"]
    return [r["grad_norm"] for r in records], [r.get("loss_scale", 1.0) for r in records]


@pytest.mark.slow
def test_gradient_norms_are_fp32s_while_the_scale_grows(
    vary: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """DeepSpeed grows the scale before it divides by it: every gradient of that step is halved."""
    half = {"engine__precision": "fp16", "engine__initial_loss_scale_power": 10}
    common = {"optim__grad_clip": 0.1, "loop__max_steps": 4, "loop__log_every": 1}
    configs = {"fp32": vary(tmp_path / "fp32", engine__precision="fp32", **common)}
    for stage, spikes in ((0, "off"), (0, "skip"), (2, "off"), (3, "off"), (3, "skip")):
        name = f"zero{stage} {spikes}"  # with skip, each step is judged by its norm
        changes = {**common, **half, "engine__loss_scale_window": 1}
        config = vary(tmp_path / name, **changes, engine__zero_stage=stage)
        configs[name] = {**config, "guard": {"spikes": spikes}}
    done = run_scenarios([{"config": config} for config in configs.values()], 1, tmp_path)
    assert done.returncode == 0, done.stdout
    expected, _ = read_norms(tmp_path / "fp32")
    for name in list(configs)[1:]:
        norms, scales = read_norms(tmp_path / name)
        assert len(set(scales)) > 1, "the scale never grew"
        assert norms == pytest.approx(expected, rel=0.02), name
