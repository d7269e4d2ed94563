"""Stage dpo: every split, packing and reference alike; equal to plain PyTorch; bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plain_preferences import train_preferences_plainly
from training_support import largest_difference, read_losses, read_masters, run_scenarios

Vary = Callable[..., dict[str, Any]]

OBJECTIVES: dict[str, dict[str, Any]] = {
    "sigmoid": {"beta": 0.5},
    "ipo": {"beta": 0.2},
    "simpo": {"beta": 2.0, "gamma": 0.5},
    "orpo": {"odds_weight": 0.5},
    "kto": {"beta": 0.5, "desirable_weight": 1.0, "undesirable_weight": 0.9},
}


def records(run_dir: Path, split: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == split]


def test_same_parameters_for_every_split_zero_stage_and_packing(
    vary_dpo: Vary, tmp_path: Path
) -> None:
    def scenario(name: str, **changes: Any) -> dict[str, Any]:
        loss = name.partition("_")[0]
        changes["stage__objective"] = {"name": loss, **OBJECTIVES[loss]}
        if loss == "sigmoid":
            changes["stage__nll_weight"] = 0.3
        # At a high rate Adam's first steps would turn rounding into differences.
        return {"config": vary_dpo(tmp_path / name, optim__lr=1e-4, **changes)}

    unpacked: dict[str, Any] = {"data__packing": False, "loop__global_batch_tokens": 96 * 12}
    one = [scenario(name) for name in OBJECTIVES]
    one += [
        scenario("sigmoid_padded", engine__zero_stage=1) | {"explode": True},
        scenario("kto_padded", engine__zero_stage=2) | {"explode": True},
        scenario("sigmoid_unpacked", **unpacked),
    ]
    two = [
        scenario("kto_2_zero3", engine__zero_stage=3, loop__micro_batch_size=1),
        scenario("sigmoid_2_zero3", engine__zero_stage=3, loop__micro_batch_size=1),
        scenario("sigmoid_2_zero2", engine__zero_stage=2),
        scenario("kto_2_zero2", engine__zero_stage=2),
        scenario("sigmoid_unpacked_2_zero3", engine__zero_stage=3, **unpacked),
    ]
    for num_ranks, scenarios in ((1, one), (2, two)):
        # So that one rank and two each compute the reference.
        store = Path(scenarios[0]["config"]["data"]["store_dir"])
        shutil.rmtree(store / "reference", ignore_errors=True)
        done = run_scenarios(scenarios, num_ranks, tmp_path)
        assert done.returncode == 0, done.stdout
    for one_of in one:
        name = Path(one_of["config"]["run_dir"]).name
        if name.endswith("_padded"):
            continue
        expected = train_preferences_plainly(one_of["config"])
        for run_dir in tmp_path.glob(f"{name}*"):
            if ("unpacked" in name) == ("unpacked" in run_dir.name):
                difference = largest_difference(expected, read_masters(run_dir))
                assert difference < 2e-6, (run_dir.name, difference)
        losses = read_losses(tmp_path / name)
        assert losses[5] < losses[1] - 0.01  # it did learn, so the comparison compares something
