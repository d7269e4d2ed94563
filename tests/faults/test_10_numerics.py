"""Row 10: losses and gradients that are not finite, and spikes, under every policy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_runs import make_ppo
from training_fixtures import varying
from training_support import read_losses, read_masters, run_scenarios

from trainer.config import load_config
from trainer.data.prepared.prepare import ensure_prepared
from trainer.engine.committed import list_steps
from trainer.lives import newest_step
from trainer.roll_back import ROLL_BACKS_NAME, read_roll_backs

Vary = Callable[..., dict[str, Any]]
pytestmark = [pytest.mark.slow, pytest.mark.faults(row=10)]
LOSS, GRADIENT = "nan_at", "nan_gradient_at"
BF16: dict[str, Any] = {"engine__precision": "bf16"}
CPU = {"engine__offload_optimizer": "cpu"}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "0 fp32": (LOSS, {}),
    "0 bf16": (GRADIENT, BF16),
    "1 bf16": (LOSS, {"engine__zero_stage": 1, **BF16}),
    "2 bf16": (LOSS, {"engine__zero_stage": 2, **BF16}),
    "2 fp32": (GRADIENT, {"engine__zero_stage": 2}),
    "2 fp32 cpu": (LOSS, {"engine__zero_stage": 2, **CPU}),
    "3 fp32": (LOSS, {"engine__zero_stage": 3}),
    "3 bf16 cpu": (GRADIENT, {"engine__zero_stage": 3, **BF16, **CPU}),
}


def last_state(run_dir: Path) -> dict[str, Any]:
    path = list_steps(run_dir / "checkpoints")[0]
    return json.loads((path / "manifest.json").read_text())["state"]


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = map(json.loads, lines)
    return [r for r in records if r["split"] == "event" and r["event"] == name]


def assert_same_end(left: Path, right: Path) -> None:
    """Compare masters, moments, Adam's counter and the loss scale bit for bit."""
    ours, theirs = (list_steps(run / "checkpoints")[0] for run in (left, right))
    for file in sorted(ours.glob("rank_*.safetensors")):
        assert file.read_bytes() == (theirs / file.name).read_bytes(), (left.name, file.name)
    for key in ("adam_step", "scaler"):
        assert last_state(left)[key] == last_state(right)[key], (left.name, key)


def test_a_skipped_step_leaves_everything_as_it_was(vary: Vary, tmp_path: Path) -> None:
    scenarios = []
    for way, (twist, changes) in WAYS.items():
        for one in (twist, "no_update_at"):
            config = vary(tmp_path / way / one, loop__max_steps=4, **changes)
            config["guard"] = {"non_finite": "skip"}
            scenarios.append({"config": config, one: 2})
    done = run_scenarios(scenarios, 2, tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    for way, (twist, _) in WAYS.items():
        run_dir = tmp_path / way / twist
        assert_same_end(run_dir, tmp_path / way / "no_update_at")
        [skip] = events(run_dir, "skip")
        assert skip["skipped"] == 3 and len(skip["rows"]) == 2 and all(skip["rows"])
        assert ("rows" in skip["why"]) == (twist == LOSS)
        assert last_state(run_dir)["adam_step"] == 3
        assert all(torch.isfinite(value).all() for value in read_masters(run_dir).values())
        assert read_losses(run_dir).keys() == {1, 2, 4}  # the third has no figures


def test_spikes_are_skipped_or_stop_and_skips_and_roll_backs_run_out(
    vary: Vary, tmp_path: Path
) -> None:
    changes = {"loop__max_steps": 8, "loop__save_every": 2}

    def guarded(name: str, **guard: Any) -> dict[str, Any]:
        return vary(tmp_path / name, **changes) | {"guard": guard}

    spikes = {"spikes": "skip", "spike_window": 4}
    whole, stop = guarded("whole", **spikes), guarded("stop", **spikes | {"spikes": "stop"})
    fp16 = {"engine__precision": "fp16", "engine__initial_loss_scale_power": 4}
    scaled = []
    for stage in (0, 3):
        for twist in ("spike_at", "no_update_at"):
            more = {**changes, **fp16, "engine__zero_stage": stage}
            config = vary(tmp_path / f"fp16 {stage} {twist}", **more) | {"guard": spikes}
            scaled.append({"config": config, twist: 6})
    always = {"non_finite": "roll_back", "max_roll_backs": 1}
    done = run_scenarios(
        [
            {"config": guarded("skip", **spikes), "spike_at": 6},
            {"config": whole, "no_update_at": 6},
            {"config": stop, "spike_at": 6, "expect": "NumericsError"},
            {"config": guarded("again", **always), "nan_at": 5, "expect": "NumericsError"},
            *scaled,
        ],
        2,
        tmp_path,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert_same_end(tmp_path / "skip", tmp_path / "whole")
    for stage in (0, 3):
        assert_same_end(
            *(tmp_path / f"fp16 {stage} {twist}" for twist in ("spike_at", "no_update_at"))
        )
        assert last_state(tmp_path / f"fp16 {stage} spike_at")["num_overflows"] == 0
        assert len(events(tmp_path / f"fp16 {stage} spike_at", "skip")) == 1
    [skip] = events(tmp_path / "skip", "skip")
    assert "leaps from a median of" in skip["why"] and "at step 7" in skip["why"]
    assert "leaps from a median of" in done.stdout and newest_step(tmp_path / "stop") == 6
    assert "guard.max_roll_backs=1 are used up" in done.stdout
    assert newest_step(tmp_path / "again") == 4 and len(read_roll_backs(tmp_path / "again")) == 1


BACK = ("1 bf16", "2 fp32 cpu", "3 fp32")


def test_a_roll_back_goes_on_with_other_data_in_this_life_or_the_next(
    vary: Vary, tmp_path: Path
) -> None:
    """A row of the fourth step is bad: the run goes back to step 2 and on behind that step."""

    def scenario(way: str, folder: Path) -> dict[str, Any]:
        changes = {"loop__max_steps": 6, "loop__save_every": 2, **WAYS[way][1]}
        config = vary(folder / way, **changes) | {"guard": {"non_finite": "roll_back"}}
        return {"config": config, "nan_row": 30}

    first, second = tmp_path / "first", tmp_path / "second"
    done = run_scenarios([scenario(way, first) for way in BACK], 2, tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    for way in BACK:  # as if it had been killed right after the roll-back was written
        shutil.copytree(
            first / way / "checkpoints/step_00000002", second / way / "checkpoints/step_00000002"
        )
        shutil.copy(first / way / ROLL_BACKS_NAME, second / way)
    done = run_scenarios([scenario(way, second) for way in BACK], 2, tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    for way in BACK:
        [made] = read_roll_backs(first / way)
        assert (made.failed_step, made.to_step, made.next_row) == (4, 2, 32)
        assert "rows [" in made.reason and "30" in made.reason
        assert last_state(first / way)["loader"] == {"next_row": 8 * (6 + 2)}
        assert last_state(first / way)["guard"]["num_roll_backs"] == 1
        assert_same_end(first / way, second / way)
        [event] = events(first / way, "roll_back")
        assert event["step"] == 2 and event["failed_step"] == 4
        lines = (first / way / "metrics.jsonl").read_text().splitlines()
        steps = [r["step"] for r in map(json.loads, lines) if r["split"] == "train"]
        assert steps == [1, 2, 3, 4, 5, 6]


def test_a_flipped_bit_ends_the_run_and_is_not_saved(vary: Vary, tmp_path: Path) -> None:
    flip = {"flip_at": 3, "flip_in": "decoder.model.norm.weight", "expect": "CorruptionError"}
    scenarios = []
    for way in ("0 bf16", "1 bf16", "2 fp32", "3 fp32"):
        config = vary(tmp_path / way, loop__save_every=1, loop__max_steps=6, **WAYS[way][1])
        scenarios.append({"config": config, **flip})
    quiet = vary(tmp_path / "quiet", loop__max_steps=6) | {"guard": {"compare_every": 4}}
    scenarios.append({"config": quiet, **flip})
    done = run_scenarios(scenarios, 2, tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    for scenario in scenarios[:-1]:
        assert newest_step(Path(scenario["config"]["run_dir"])) == 3
    said = "silent corruption, after step 4: no majority among ranks on"
    assert done.stdout.count(said) == 2 * len(scenarios)  # both ranks say so
    assert newest_step(tmp_path / "quiet") == 0


def test_ppo_skips_what_has_nothing_to_learn_from(
    dpo_config: dict[str, Any], tmp_path: Path
) -> None:
    vary_ppo = varying(make_ppo(dpo_config))
    twists: dict[str, dict[str, Any]] = {
        "skip": {"nan_values_at": 1}, "whole": {"no_update_at": 1},
        "stop": {"nan_values_at": 1, "expect": "NumericsError"},
    }  # fmt: skip
    scenarios = []
    for name, twist in twists.items():
        config = vary_ppo(tmp_path / name, loop__max_steps=3, loop__save_every=1)
        config["guard"] = {"non_finite": "stop" if name == "stop" else "skip"}
        ensure_prepared(load_config(config).data, config["tokenizer"]["path"])
        scenarios.append({"config": config, **twist})
    done = run_scenarios(scenarios, 2, tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    assert_same_end(tmp_path / "skip", tmp_path / "whole")
    [skip] = events(tmp_path / "skip", "skip")
    assert "the critic's values are not finite for 1 of 4 responses" in skip["why"]
    assert skip["rows"] == [[4, 6], [5, 7]]
    assert newest_step(tmp_path / "stop") == 1
