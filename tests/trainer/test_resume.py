"""Kill -9 and resume under every engine; resume on other engines and other numbers of ranks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_support import largest_difference, read_losses, read_masters, run_scenarios

from trainer.errors import EXIT_RESUME

Vary = Callable[..., dict[str, Any]]

ENGINES: dict[str, dict[str, Any]] = {
    "zero0": {"engine__zero_stage": 0},
    "zero1": {"engine__zero_stage": 1},
    "zero2": {"engine__zero_stage": 2},
    "zero3": {"engine__zero_stage": 3},
}
OFFLOADED: dict[str, dict[str, Any]] = {
    "zero2_offload": {"engine__zero_stage": 2, "engine__offload_optimizer": "cpu"},
    "zero3_offload": {
        "engine__zero_stage": 3,
        "engine__offload_optimizer": "cpu",
        "engine__offload_params": "cpu",
    },
}
NVME: dict[str, Any] = {
    "engine__zero_stage": 3,
    "engine__offload_optimizer": "nvme",
    "engine__offload_params": "nvme",
}


def kill_and_resume(vary: Vary, folder: Path, engines: dict[str, dict[str, Any]]) -> None:
    """Kill a run of each engine in its fifth step, resume it, and compare with unbroken runs."""
    killed, unbroken = [], []
    for name, changes in engines.items():
        changes = {**changes, "loop__save_every": 3, "loop__max_steps": 6}
        killed.append({"config": vary(folder / f"{name}_killed", **changes), "kill_at": 4})
        unbroken.append({"config": vary(folder / f"{name}_unbroken", **changes)})
    for scenario in killed:
        done = run_scenarios([scenario], 2, folder)
        assert done.returncode == -9, done.stdout
        assert read_losses(Path(scenario["config"]["run_dir"])).keys() == {1, 2, 3, 4}
    again = [{"config": scenario["config"]} for scenario in killed]
    done = run_scenarios(unbroken + again, 2, folder)
    assert done.returncode == 0, done.stdout
    for name in engines:
        left, right = folder / f"{name}_unbroken", folder / f"{name}_killed"
        assert largest_difference(read_masters(left), read_masters(right)) == 0.0, name
        assert read_losses(left) == read_losses(right), name


def compare_losses(folder: Path, names: list[str], tolerance: float) -> None:
    reference = read_losses(folder / f"{names[0]}_unbroken")
    for name in names[1:]:
        losses = read_losses(folder / f"{name}_unbroken")
        assert losses.keys() == reference.keys()
        assert max(abs(losses[s] - reference[s]) for s in losses) < tolerance, name


@pytest.mark.faults(row=1)
def test_killed_run_resumes_bit_exactly(vary: Vary, tmp_path: Path) -> None:
    kill_and_resume(vary, tmp_path, ENGINES)
    compare_losses(tmp_path, list(ENGINES), 1e-5)


@pytest.mark.faults(row=1)
def test_killed_fine_tuning_resumes_bit_exactly(vary_chat: Vary, tmp_path: Path) -> None:
    """Whole conversations in bins, noise on the embeddings, rows dealt by length."""
    noise: dict[str, Any] = {"stage__neftune_alpha": 5.0}
    engines = {
        "zero2": {**ENGINES["zero2"], **noise},
        "zero3": {**ENGINES["zero3"], **noise, "data__packing": False},
    }
    kill_and_resume(vary_chat, tmp_path, engines)


@pytest.mark.faults(row=1)
def test_killed_reward_model_resumes_bit_exactly(vary_preferences: Vary, tmp_path: Path) -> None:
    engines = {
        "zero2": {**ENGINES["zero2"], "data__packing": False},
        "zero3": {**ENGINES["zero3"], "loop__eval_chars": 2000, "loop__eval_every": 2},
    }
    kill_and_resume(vary_preferences, tmp_path, engines)
    unbroken, killed = (
        json.loads((tmp_path / f"zero3_{name}/checkpoints/step_00000006/manifest.json").read_text())
        for name in ("unbroken", "killed")
    )
    assert unbroken["state"]["reward_stats"] == killed["state"]["reward_stats"]
    assert unbroken["state"]["reward_stats"]["num"] > 10


@pytest.mark.faults(row=1)
def test_killed_preference_learning_resumes_bit_exactly(vary_dpo: Vary, tmp_path: Path) -> None:
    """With KTO's baseline of mismatched answers, whose reference is cached."""
    kto = {"name": "kto", "beta": 0.5, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    engines = {"zero2": {**ENGINES["zero2"], "stage__objective": kto}}
    kill_and_resume(vary_dpo, tmp_path, engines)


@pytest.mark.slow
def test_killed_run_with_a_reference_in_its_engine_resumes(vary_dpo: Vary, tmp_path: Path) -> None:
    streaming = {**ENGINES["zero3"], "stage__reference": "streaming"}
    kill_and_resume(vary_dpo, tmp_path, {"zero3": streaming})


@pytest.mark.usefixtures("cpu_adam")
def test_killed_run_resumes_bit_exactly_with_cpu_offload(vary: Vary, tmp_path: Path) -> None:
    kill_and_resume(vary, tmp_path, {"zero0": ENGINES["zero0"], **OFFLOADED})
    compare_losses(tmp_path, ["zero0", *OFFLOADED], 1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_adam", "async_io")
def test_killed_run_resumes_bit_exactly_with_nvme_offload(vary: Vary, tmp_path: Path) -> None:
    nvme = {**NVME, "engine__nvme_path": str(tmp_path / "nvme")}
    (tmp_path / "nvme").mkdir()
    kill_and_resume(vary, tmp_path, {"zero0": ENGINES["zero0"], "zero3_nvme": nvme})
    compare_losses(tmp_path, ["zero0", "zero3_nvme"], 1e-5)


def test_resumes_on_other_engines_and_numbers_of_ranks(vary: Vary, tmp_path: Path) -> None:
    def life(name: str, max_steps: int, **changes: Any) -> dict[str, Any]:
        # The schedule needs the whole run's length, so a life ends by a signal, not max_steps.
        config = vary(tmp_path / name, loop__max_steps=6, **changes)
        return {"config": config} | ({"signal_at": max_steps - 1} if max_steps < 6 else {})

    assert run_scenarios([life("unbroken", 6)], 1, tmp_path).returncode == 0
    stopped = run_scenarios([life("lives", 2, engine__zero_stage=2)], 2, tmp_path)
    assert stopped.returncode != 0 and "stopped by" in stopped.stdout
    stopped = run_scenarios(
        [life("lives", 4, engine__zero_stage=3, loop__micro_batch_size=1)], 4, tmp_path
    )
    assert stopped.returncode != 0, stopped.stdout
    done = run_scenarios([life("lives", 6, engine__zero_stage=1)], 1, tmp_path)
    assert done.returncode == 0, done.stdout
    reference, losses = read_losses(tmp_path / "unbroken"), read_losses(tmp_path / "lives")
    assert losses.keys() == reference.keys() == set(range(1, 7))
    assert max(abs(losses[s] - reference[s]) for s in losses) < 1e-4
    weights = read_masters(tmp_path / "lives")
    assert largest_difference(read_masters(tmp_path / "unbroken"), weights) < 1e-5


@pytest.mark.slow
def test_low_precision_resumes_bit_exactly(vary: Vary, tmp_path: Path) -> None:
    engines = {
        f"{precision}_zero{stage}": {
            "engine__zero_stage": stage,
            "engine__precision": precision,
            "engine__initial_loss_scale_power": 10,
            "engine__loss_scale_window": 2,  # doubles within the run: its state must resume
        }
        for precision in ("bf16", "fp16")
        for stage in (0, 1, 2, 3)
    }
    scenarios = []
    for name, changes in engines.items():
        config = vary(tmp_path / f"{name}_unbroken", **changes, loop__save_every=3)
        scenarios.append({"config": config})
    done = run_scenarios(scenarios, 2, tmp_path)
    assert done.returncode == 0, done.stdout
    again = []
    for name, changes in engines.items():
        left, right = tmp_path / f"{name}_unbroken", tmp_path / f"{name}_resumed"
        shutil.copytree(left, right)
        shutil.rmtree(right / "checkpoints/step_00000005")
        again.append({"config": vary(right, **changes, loop__save_every=3)})
    done = run_scenarios(again, 2, tmp_path)
    assert done.returncode == 0, done.stdout
    for name in engines:
        left, right = tmp_path / f"{name}_unbroken", tmp_path / f"{name}_resumed"
        assert read_losses(left) == read_losses(right), name
        assert largest_difference(read_masters(left), read_masters(right)) == 0.0, name
        if name.startswith("fp16"):
            lines = (left / "metrics.jsonl").read_text().splitlines()
            scales = [json.loads(line).get("loss_scale") for line in lines]
            assert max(s for s in scales if s) > 2**10, name


def test_rotation_deletes_only_what_it_should(tmp_path: Path) -> None:
    from trainer.config import LoopConfig
    from trainer.engine.rotation import rotate

    for step in (2, 4, 6, 8, 10, 12):
        (tmp_path / f"step_{step:08d}").mkdir()
    (tmp_path / ".step_00000014.tmp").mkdir()
    # 12 is damaged and was walked over: it takes no place among the two kept.
    deleted = rotate(tmp_path, 10, LoopConfig(keep_last=2, keep_every=4))
    assert {path.name for path in deleted} == {f"step_{s:08d}" for s in (2, 6, 12)}
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step_{s:08d}" for s in (4, 8, 10)]


def test_finished_run_is_left_alone(vary: Vary, tmp_path: Path) -> None:
    config = vary(tmp_path / "run", loop__max_steps=2)
    assert run_scenarios([{"config": config}], 1, tmp_path).returncode == 0
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    done = run_scenarios([{"config": config}], 1, tmp_path)
    assert done.returncode == 0 and "is finished at step 2" in done.stdout
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def evaluated_steps(run_dir: Path) -> list[int]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [r["step"] for r in map(json.loads, lines) if r["split"] == "eval"]


@pytest.mark.parametrize("stopped_at", [0, 2, 4])
def test_evaluation_that_a_signal_stopped_is_made_up_for(
    vary: Vary, tmp_path: Path, stopped_at: int
) -> None:
    changes = {"loop__eval_chars": 2000, "loop__eval_every": 2, "loop__max_steps": 4}
    config = vary(tmp_path / "run", **changes)
    twisted = {"config": config, "signal_in_evaluation": stopped_at}
    stopped = run_scenarios([twisted], 1, tmp_path)
    assert "stopped by SIGUSR1" in stopped.stdout
    assert evaluated_steps(tmp_path / "run") == list(range(0, stopped_at, 2))
    done = run_scenarios([{"config": config}], 1, tmp_path)
    assert done.returncode == 0, done.stdout
    assert evaluated_steps(tmp_path / "run") == [0, 2, 4]
    assert read_losses(tmp_path / "run").keys() == {1, 2, 3, 4}


def test_signal_before_a_step_leaves_the_loaded_checkpoint_alone(
    vary: Vary, tmp_path: Path
) -> None:
    from trainer.engine import committed

    config = vary(tmp_path / "run", loop__max_steps=4)
    stopped = run_scenarios([{"config": config, "signal_at": 1}], 1, tmp_path)
    assert "after step 2" in stopped.stdout
    manifest = tmp_path / "run/checkpoints/step_00000002/manifest.json"
    before = manifest.stat().st_ino
    stopped = run_scenarios([{"config": config, "signal_at_start": True}], 1, tmp_path)
    assert "stopped by SIGUSR1" in stopped.stdout
    assert manifest.stat().st_ino == before
    # Even a save of the same step, killed at its worst moment, loses nothing.
    old = manifest.parent.with_name(".step_00000002.old")
    manifest.parent.rename(old)
    newest = committed.find_newest(tmp_path / "run/checkpoints")
    assert newest is not None and newest.step == 2 and not old.exists()


def test_changed_inputs_are_refused_at_resume(
    vary: Vary, tmp_path: Path, english_tokenizer: Path
) -> None:
    import shutil

    from trainer.config import load_config
    from trainer.data.prepared.prepare import ensure_prepared

    texts = tmp_path / "texts"
    texts.mkdir()
    shutil.copy(Path(__file__).parents[2] / "samples/en.jsonl", texts)
    config = vary(tmp_path / "run", loop__save_every=2, data__store_dir=str(tmp_path / "store"))
    config["data"]["sources"]["en"]["paths"] = [str(texts)]
    ensure_prepared(load_config(config).data, english_tokenizer)
    stopped = run_scenarios([{"config": config, "signal_at": 1}], 1, tmp_path)
    assert "stopped by" in stopped.stdout
    (texts / "more.jsonl").write_text('{"text": "One more document, added between two lives."}\n')
    ensure_prepared(load_config(config).data, english_tokenizer)
    refused = run_scenarios([{"config": config}], 1, tmp_path)
    assert refused.returncode != 0
    assert "has changed since its checkpoint: data.sources.en (files" in refused.stdout


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "fp32"), (2, "bf16")])
def test_gradient_that_is_not_finite_stops_and_is_never_saved(
    vary: Vary, tmp_path: Path, stage: int, precision: str
) -> None:
    changes = {"loop__save_every": 2, "loop__log_every": 5}
    changes |= {"engine__zero_stage": stage, "engine__precision": precision}
    config = vary(tmp_path / "run", **changes)
    done = run_scenarios([{"config": config, "nan_gradient_at": 3}], 1, tmp_path)
    assert done.returncode != 0
    assert "gradient norm is not finite at step 4" in done.stdout
    assert [p.name for p in (tmp_path / "run/checkpoints").glob("step_*")] == ["step_00000002"]


def test_fp16_overflow_is_skipped_wherever_it_falls(vary: Vary, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"engine__precision": "fp16", "loop__log_every": 5}
    changes["engine__initial_loss_scale_power"] = 10
    runs = [
        {
            "config": vary(tmp_path / f"{stage}", engine__zero_stage=stage, **changes),
            "overflow_at": 4,
        }
        for stage in (0, 2, 3)
    ]
    done = run_scenarios(runs, 1, tmp_path)
    assert done.returncode == 0, done.stdout
    for stage in (0, 2, 3):
        lines = (tmp_path / f"{stage}/metrics.jsonl").read_text().splitlines()
        [last] = [r for r in map(json.loads, lines) if r["split"] == "train"]
        assert (last["num_overflows"], last["loss_scale"]) == (1, 2**9), stage


def test_nan_loss_stops_with_step_rank_and_rows(vary: Vary, tmp_path: Path) -> None:
    config = vary(tmp_path / "run", loop__save_every=2)
    done = run_scenarios([{"config": config, "nan_at": 3}], 2, tmp_path)
    assert done.returncode not in (0, EXIT_RESUME)
    assert re.search(r"loss is not finite at step 4, rows \[\d+(, \d+)*\] on rank 1", done.stdout)
    saved = read_masters(tmp_path / "run")
    assert all(torch.isfinite(value).all() for value in saved.values())
    assert [p.name for p in (tmp_path / "run/checkpoints").glob("step_*")] == ["step_00000002"]


def test_collapsing_loss_scale_stops_with_the_reason(vary: Vary, tmp_path: Path) -> None:
    config = vary(
        tmp_path / "run",
        engine__precision="fp16",
        engine__initial_loss_scale_power=40,
        engine__min_loss_scale=2**39,
        engine__zero_stage=2,
        loop__max_steps=20,
    )
    done = run_scenarios([{"config": config}], 1, tmp_path)
    assert done.returncode != 0
    assert "8 steps in a row overflowed there" in done.stdout
    assert "Scales of the last steps: 5.49756e+11" in done.stdout
