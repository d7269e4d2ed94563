"""Which steps are replayed, what of two records is compared, and real replays of real runs."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from faulty_runs import make_ppo
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors

from launch import export, verify
from launch.exports import EXPORTS_NAME, describe_files, read_exports
from launch.run_folder import CONFIG_FILE, read
from launch.verification.exports import check_weights
from launch.verification.records import Span
from launch.verification.replay import (
    Replayed,
    compare_resumed,
    compare_with_run,
    own_environment,
)
from launch.verification.replay_plan import choose_middle, choose_spans, plan_replay, settle_ranks
from launch.verification.sameness import compare_spans, compare_weights, describe_difference
from trainer.config import load_config
from trainer.disk import hash_file
from trainer.engine.manifest import FORMAT
from trainer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


def spans(*ends: int, start: int = 0, **record: Any) -> list[Span]:
    """Return records of the steps between each two of ``ends``."""
    starts = [start, *ends]
    return [Span(a, b, {"step": b, **record}) for a, b in zip(starts, ends, strict=False)]


def test_steps_are_rounded_up_to_whole_records() -> None:
    listed = spans(10, 20, 30, 40)
    assert [s.end for s in choose_spans(listed, 10, 15)] == [20, 30]
    assert [s.end for s in choose_spans(listed, 10, 3)] == [20, 30]  # a stop between two of them
    assert [s.end for s in choose_spans(listed, 15, 3)] == [30, 40]  # (10, 20] began before
    assert [s.end for s in choose_spans(listed, 30, 99)] == [40]
    assert choose_spans(listed, 40, 1) == []


def test_the_middle_is_a_checkpoint_of_the_run_if_there_is_one() -> None:
    saved = {n: Path() for n in (4, 7, 12)}
    listed = spans(6, 8, 10, 12, start=4)
    assert choose_middle(4, listed, saved) == 7
    assert choose_middle(4, listed, {4: Path()}) == 8
    assert choose_middle(4, listed[:1], saved) is None


@pytest.fixture
def run_dir(base_config: dict[str, Any], tmp_path: Path) -> Path:
    """Return a run of 12 steps with checkpoints of 4, 8 and 12, and lives on 2 and on 4 ranks."""
    for step in (4, 8, 12):
        (tmp_path / f"checkpoints/step_{step:08d}").mkdir(parents=True)
    records = [{"split": "train", "step": n} for n in range(1, 13)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    lives = [{"started": "", "token": n, "first_step": s, "world_size": w}
             for n, s, w in ((1, 0, 2), (2, 6, 4))]  # fmt: skip
    (tmp_path / "lives.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lives))
    return tmp_path


def test_the_newest_checkpoint_with_enough_records_behind_it(
    run_dir: Path, base_config: dict[str, Any]
) -> None:
    plan = plan_replay(run_dir, 4, None)
    assert (plan.start, plan.middle, plan.end, plan.log_every) == (8, 10, 12, 1)
    assert plan.checkpoint is not None and plan.checkpoint.name == "step_00000008"
    assert plan.life["world_size"] == 4
    longer = plan_replay(run_dir, 6, None)
    assert (longer.start, longer.middle, longer.end) == (4, 8, 10)
    assert longer.life["world_size"] == 2
    start = plan_replay(run_dir, 6, 0)
    assert start.checkpoint is None and (start.start, start.middle, start.end) == (0, 4, 6)
    assert plan_replay(run_dir, 99, None).start == 8  # nothing has 99 behind it
    with pytest.raises(ConfigError, match=r"--step 5: .* there are 12, 8, 4"):
        plan_replay(run_dir, 2, 5)
    with pytest.raises(ConfigError, match="nothing to compare"):
        plan_replay(run_dir, 2, 12)


def test_only_what_changes_no_result_differs_from_the_runs_config(
    run_dir: Path, base_config: dict[str, Any]
) -> None:
    values = copy.deepcopy(base_config)
    values["log"] = {"wandb": "online", "tensorboard": True}
    before = copy.deepcopy(values)
    plan = plan_replay(run_dir, 4, None)
    changed = plan.config(values, 2)
    assert values == before
    assert changed["log"] == {"wandb": "off", "tensorboard": False}
    assert (changed["loop"]["log_every"], changed["loop"]["save_every"]) == (1, 10)
    load_config(changed)
    assert {k: v for k, v in changed.items() if k not in ("log", "loop", "cluster")} == {
        k: v for k, v in before.items() if k not in ("log", "loop", "cluster")
    }


def test_ranks_are_the_runs_as_far_as_they_fit(run_dir: Path, base_config: dict[str, Any]) -> None:
    plan = plan_replay(run_dir, 4, None)  # of a life of 4 ranks; 8 rows a step, 2 a micro-batch
    assert settle_ranks(plan, base_config, None, present=8) == 4
    assert settle_ranks(plan, base_config, None, present=3) == 2  # 3 do not divide
    assert settle_ranks(plan, base_config, 1, present=8) == 1
    with pytest.raises(ConfigError, match="not a multiple"):
        settle_ranks(plan, base_config, 3, present=8)
    with pytest.raises(ConfigError, match="no steps"):
        settle_ranks(plan, {"stage": {"name": "vocab"}}, None, 1)


def test_records_of_the_same_steps_are_compared_to_the_last_bit() -> None:
    ours, theirs = spans(1, 2, 3, loss=1.0), spans(1, 2, 3, loss=1.0)
    assert compare_spans(ours, theirs) == (3, None)
    theirs[1] = Span(1, 2, {"loss": 1.0 + 2**-52})
    theirs[2] = Span(2, 3, {"loss": 1.5})
    num, found = compare_spans(ours, theirs)
    assert num == 3 and found is not None and (found.step, found.figure) == (2, "loss")
    assert found.largest == pytest.approx(1 / 3)
    assert "first at step 2 in loss: 1.0 and 1.0000000000000002" in describe_difference(found)
    assert compare_spans(ours, [Span(0, 3, {"loss": 9.0})]) == (0, None)  # of other steps
    assert compare_spans(ours[:1], [Span(0, 1, {})])[1] is not None  # a figure that is gone


def write_checkpoint(folder: Path, value: float, num_files: int = 1) -> Path:
    folder.mkdir()
    files, size = {}, 4 // num_files
    for n in range(num_files):
        kinds = ("master", "exp_avg", "exp_avg_sq")
        part = {f"a|{k}@{n * size}": np.full(size, value, np.float32) for k in kinds}
        path = folder / f"rank_{n:05d}.safetensors"
        save_file(part, path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    manifest = {"format": FORMAT, "step": 1, "files": files, "parameters": {"a": [2, 2]},
                "state": {}}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_weights_are_compared_by_name_whatever_the_ranks(tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path / "one", 1.0)
    assert compare_weights(one, write_checkpoint(tmp_path / "two", 1.0, num_files=2)) == (0.0, "")
    largest, where = compare_weights(one, write_checkpoint(tmp_path / "three", 1.25))
    assert largest == 0.25 and where.startswith("a (")


def replayed(listed: list[Span], **environment: Any) -> Replayed:
    return Replayed(Path(), listed, {"device": "cpu", **environment})


def test_another_machine_and_gpus_have_the_tolerance_of_the_precision(run_dir: Path) -> None:
    """The run's folder says nothing of its machine, so only a replay without facts is of the same.

    The loss differs by 1e-3 from that of the run: too much for fp32, not for bf16.
    """
    plan = plan_replay(run_dir, 4, None)
    for span in plan.spans:
        span.record["loss"] = 1.0
    ours = [Span(s.start, s.end, {**s.record, "loss": 1.001}) for s in plan.spans]
    exact = [Span(s.start, s.end, dict(s.record)) for s in plan.spans]

    def states(listed: list[Span], **environment: Any) -> tuple[str, str]:
        made = replayed(listed, **environment)
        [check] = compare_with_run(run_dir, plan, made)
        return check.state, compare_resumed(plan, replayed(exact, **environment), made).state

    assert states(exact) == ("ok", "ok")
    assert states(ours) == ("problem", "problem")  # on the same CPU: to the last bit
    assert states(ours, torch="1.0", precision="bf16") == ("ok", "problem")
    assert states(ours, torch="1.0", precision="fp32") == ("problem", "problem")
    assert states(ours, device="cuda:0", precision="bf16") == ("ok", "ok")
    assert states(ours, device="cuda:0", precision="fp32") == ("problem", "problem")
    assert states([Span(0, 3, {"loss": 1.0})]) == ("unchecked", "unchecked")


def test_a_replay_inherits_nothing_of_a_job() -> None:
    given = {"RANK": "1", "SLURM_JOB_ID": "7", "KUROSHIO_FAULT": "kill@step", "HOME": "/h"}
    made = own_environment(given)
    assert made.keys() == {"HOME", "PYTHONPATH"} and str(ROOT) in made["PYTHONPATH"]


def check_export(run_dir: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Export a run, then change one weight and write the export's hashes anew."""
    export.main([str(run_dir), str(out)])
    assert verify.main([str(run_dir)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "its tokenizer fits its embedding" in text
    assert "tensors are those of step_00000006" in text
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"] += 1
    save_tensors(tensors, file)
    (record,) = read_exports(run_dir)
    (run_dir / EXPORTS_NAME).write_text(json.dumps(record | {"files": describe_files(out)}))
    wrong = check_weights(run_dir, read(run_dir / CONFIG_FILE), out,
                          run_dir / "checkpoints/step_00000006", record)  # fmt: skip
    assert wrong.state == "problem" and verify.main([str(run_dir)]) == 66
    assert "model.norm.weight is not what the checkpoint gives" in wrong.what


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
def test_a_run_is_replayed(
    stage: str,
    chat_config: dict[str, Any],
    dpo_config: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bases = {"sft": chat_config, "dpo": dpo_config, "ppo": make_ppo(dpo_config)}
    values = copy.deepcopy(bases[stage])
    run_dir = tmp_path / "run"
    values["run_dir"] = str(run_dir)
    values["engine"] |= {"zero_stage": 1}
    values["loop"] |= {"max_steps": 6, "save_every": 2, "log_every": 1}
    values["cluster"] |= {"gpus_per_node": 2 if stage == "sft" else 1}
    asked = tmp_path / "asked.yaml"
    asked.write_text(yaml.safe_dump(values))
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-m", "launch", "run", "--config", str(asked)],
        env=environ, cwd=ROOT, check=True, capture_output=True, timeout=240,
    )  # fmt: skip
    if stage == "ppo":  # a record that is not what happened
        journal = run_dir / "metrics.jsonl"
        records = [json.loads(line) for line in journal.read_text().splitlines()]
        for record in records:
            if record["split"] == "train" and record["step"] == 4:
                record["reward"] += 0.25
        journal.write_text("".join(json.dumps(record) + "\n" for record in records))
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    code = verify.main([str(run_dir), "--replay", "4", "--json"])
    checks = json.loads(capsys.readouterr().out)["checks"]
    replayed = [check["what"] for check in checks if check["topic"] == "replay"]
    assert f"steps 3 to 6 from checkpoint of step 2, on {2 if stage == 'sft' else 1}" in replayed[0]
    if stage == "ppo":
        assert code == 66 and "they differ first at step 4 in reward" in replayed[1]
    else:
        assert code == 0 and "4 records of steps 3 to 6 are reproduced to the last" in replayed[1]
    assert "step_00000004 of the run and of the replay hold the same weights" in replayed[2]
    assert "stopped at step 4 and resumed: 2 records equal" in replayed[3]
    assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before
    if stage == "sft":
        check_export(run_dir, tmp_path / "exported", capsys)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".run.verify")] == []
