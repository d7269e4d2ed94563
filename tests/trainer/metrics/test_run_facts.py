"""What a run's folder says, whatever state its files are in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import RunFolder

from trainer.errors import ConfigError
from trainer.metrics.life import build_life, describe_exit, rank_hours, read_time
from trainer.metrics.run_facts import read_run
from trainer.metrics.tail import read_tail

NOW = 1.8e9


def folder(tmp_path: Path, **config: object) -> RunFolder:
    return RunFolder(tmp_path / "run", NOW, **config)


def test_a_running_run(tmp_path: Path) -> None:
    run = folder(tmp_path).life(3600).train(99, 10).train(100, 8).save(80, 48).hold(3)
    facts = read_run(run.path, NOW)
    assert (facts.name, facts.stage, facts.step, facts.max_steps) == ("tuned", "sft", 100, 400)
    assert facts.time_left_s(is_alive=True) == 600 - 8 and not facts.is_finished
    assert facts.saved and facts.saved.step == 80
    assert facts.seconds_since(facts.saved.time) == pytest.approx(48)
    assert facts.last_sign == pytest.approx(NOW - 3)
    assert facts.rank_hours(is_alive=True) == (pytest.approx(4), True)
    assert facts.problems == []


def test_time_left_goes_on_while_the_run_lives(tmp_path: Path) -> None:
    facts = read_run(folder(tmp_path).train(390, 3600).save(395).path, NOW)
    assert facts.time_left_s(is_alive=True) == 0  # slower than it was, but never negative
    assert facts.time_left_s(is_alive=False) == 20 - 5 * 2.0


def test_finished_means_saved_and_evaluated_at_the_last_step(tmp_path: Path) -> None:
    run = folder(tmp_path).train(400, 10).save(400, 5, evaluated=False)
    assert not read_run(run.path, NOW).is_finished
    other = RunFolder(tmp_path / "other", NOW).train(400, 10).save(400, 5)
    facts = read_run(other.path, NOW)
    assert facts.is_finished and facts.time_left_s(is_alive=False) is None


def test_a_stage_without_steps_is_finished_by_its_end(tmp_path: Path) -> None:
    run = folder(tmp_path, stage={"name": "vocab"}).life(60).end(10, 0)
    assert read_run(run.path, NOW).is_finished


def test_a_line_being_written_and_one_torn_by_a_kill(tmp_path: Path) -> None:
    run = folder(tmp_path).train(1, 10)
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"split": "train", "st\n' + b'{"split": "train", "step": 3, "loss": 1')
    with (run.path / "lives.jsonl").open("ab") as file:
        file.write(b'{"started": "2026-')
    facts = read_run(run.path, NOW)
    assert facts.step == 1 and facts.lives == [] and facts.problems == []


def test_a_run_without_metrics_and_one_without_config(tmp_path: Path) -> None:
    facts = read_run(folder(tmp_path).path, NOW)
    assert facts.step is None and facts.time_left_s(is_alive=True) is None and facts.lives == []
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"not the folder of a run.*give the run_dir"):
        read_run(tmp_path / "run", NOW)
    facts = read_run(RunFolder(tmp_path / "b", NOW).train(3, 1).path, NOW)
    (tmp_path / "b" / "config.yaml").unlink()
    facts = read_run(tmp_path / "b", NOW)
    assert (facts.name, facts.step, facts.max_steps) == ("b", 3, None)


def test_broken_files_are_problems_and_not_errors(tmp_path: Path) -> None:
    run = folder(tmp_path).train(5, 10).save(4).hold(1)
    (run.path / "config.yaml").write_text("a: [")
    (run.path / "submit.json").write_text("[]")
    (run.path / "leases" / "00001.json").write_text("{}")
    bad = run.path / "checkpoints" / "step_00000005"
    bad.mkdir()
    (bad / "manifest.json").write_text("{")
    facts = read_run(run.path, NOW)
    assert facts.step == 5 and facts.saved and facts.saved.step == 4
    assert len(facts.problems) == 3
    for name, problem in zip(("config.yaml", "lease", "submit.json"), facts.problems, strict=True):
        assert name in problem


def test_a_heartbeat_from_the_future_is_told(tmp_path: Path) -> None:
    facts = read_run(folder(tmp_path).life(60).train(5, -30).hold(-90).path, NOW)
    assert len(facts.problems) == 1 and "90 s in the future: the clock of n1" in facts.problems[0]
    assert facts.time_left_s(is_alive=True) == 2.0 * 395 and facts.holder
    assert facts.seconds_since(facts.holder.heartbeat) == 0


def test_nan_is_no_figure(tmp_path: Path) -> None:
    facts = read_run(folder(tmp_path).train(5, 10, eta_s="nan").path, NOW)
    assert facts.time_left_s(is_alive=True) is None


def test_costs_are_those_of_the_profile(tmp_path: Path) -> None:
    price = {"who": "academic", "currency": "TWD", "per_gpu_hour": 10.5, "source": "page",
             "date": "2026-01"}  # fmt: skip
    run = folder(tmp_path, cluster={"site": {"prices": [price]}})
    (cost,) = read_run(run.path, NOW).costs(4.0)
    assert (cost.who, cost.currency, cost.amount) == ("academic", "TWD", 42.0)
    other = RunFolder(tmp_path / "other", NOW, cluster={"site": {"prices": []}})
    assert read_run(other.path, NOW).costs(4.0) == []


def test_jobs_of_submission_and_lives(tmp_path: Path) -> None:
    run = folder(tmp_path).submitted("7", "9").life(60, job="7").life(30, job="12", token=2)
    assert read_run(run.path, NOW).job_ids == ["7", "9", "12"]


def test_tail_reads_only_as_far_back_as_needed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"split": "train", "step": n, "pad": "x" * 1000}) for n in range(1000)]
    lines += [json.dumps({"split": "table", "rows": "臺" * 10_000})] * 2
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    tail = read_tail(path, lambda records: any(r["split"] == "train" for r in records))
    steps = [r["step"] for r in tail if r["split"] == "train"]
    assert steps[-1] == 999 and len(steps) < 600
    assert read_tail(path, lambda _: False, max_bytes=1 << 16) == tail[-1:]
    assert read_tail(tmp_path / "none", lambda _: False) == []


def test_why_a_life_ended() -> None:
    start = {"started": "2026-01-02T03:04:05+00:00", "host": "n1", "world_size": 2}
    assert build_life(start).why == "" and not build_life(start).has_ended
    for facts, why in (
        ({"exit_code": 137}, "killed by SIGKILL"),
        ({"exit_code": 75}, "stopped after a save"),
        ({"exit_code": 74}, "Disk full, quota reached or folder not writable"),
        ({"exit_code": 3}, "exit code 3"),
        ({"exit_code": 76, "reason": "loss is NaN"}, "loss is NaN"),
        ({"exit_code": 1, "reason": "x", "decision_reason": "x. Life 2"}, "x. Life 2"),
    ):  # fmt: skip
        assert build_life(start | {"ended": "2026-01-02T03:05:05Z"} | facts).why == why
    assert describe_exit(0) == "done"
    assert build_life({"world_size": "two", "started": 3}).world_size is None


def test_hours_of_a_life_whose_end_is_unknown_are_a_lower_bound() -> None:
    whole = build_life({"started": 0, "ended": 3600, "world_size": 2})
    lost = build_life({"started": 9000, "world_size": 2})
    assert rank_hours([whole, lost], until=9000 + 1800) == (3.0, True)
    assert rank_hours([lost, whole], until=None) == (2.0, False)
    assert rank_hours([build_life({"exit_code": 78}), whole], until=None) == (2.0, True)
    assert rank_hours([build_life({"started": 100, "world_size": 1})], until=50) == (0.0, True)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("1970-01-01T00:01:00Z", 60.0), ("1970-01-01T01:01:00+01:00", 60.0), (5, 5.0), (True, None),
     ("yesterday", None), (None, None)],
)  # fmt: skip
def test_times(value: object, seconds: float | None) -> None:
    assert read_time(value) == seconds
