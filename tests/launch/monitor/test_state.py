"""A run's state follows from its files and what Slurm says of its jobs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from run_folders import RunFolder

from launch.monitor.queue import Job, parse_jobs
from launch.monitor.state import State, judge, newest_job
from trainer.lease import Process
from trainer.metrics.run_facts import read_run

NOW = 1.8e9
RUNNING = Job("7", "RUNNING", "None", NOW + 600, NOW - 600, "n[1-2]")
PENDING = Job("7", "PENDING", "Priority", None, NOW + 60, "")
FAILED = Job("7", "FAILED", "NonZeroExitCode", NOW, NOW - 60, "n1")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run", NOW).submitted("7")


def state(run: RunFolder, *jobs: Job) -> State:
    return judge(read_run(run.path, NOW), {job.number: job for job in jobs})


def test_a_task_of_an_array_is_known_by_both_of_its_numbers(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "task", NOW).submitted("7_2")
    run.life(900, job="9").end(60, 65, job="9", restart=0, reason="bad row")
    jobs = parse_jobs("9|7_2|FAILED|N/A|N/A|NonZeroExitCode|n1")
    found = judge(read_run(run.path, NOW), jobs)
    assert found.word == "failed" and "bad row" in found.note


def test_before_the_first_life(run: RunFolder, tmp_path: Path) -> None:
    assert state(run, PENDING) == State("pending", "Priority")
    assert state(run, replace(PENDING, reason="JobHeldUser")) == State("held", "JobHeldUser")
    assert state(run, RUNNING) == State("running", "")
    assert state(run, replace(RUNNING, state="CONFIGURING")).note == "configuring"
    assert state(run, FAILED) == State("failed", "job 7 FAILED before it began to run")
    assert state(run, replace(FAILED, state="CANCELLED")).word == "stopped"
    assert state(run).word == "failed"  # Slurm was asked and knows nothing of it
    assert judge(read_run(run.path, NOW), None) == State("submitted", "")
    assert judge(read_run(RunFolder(tmp_path / "b", NOW).path, NOW), None) == State("new", "")


def test_between_lives(run: RunFolder) -> None:
    run.life(90, job="7").end(60, 137, decision="requeue", decision_reason="killed. Life 2")
    assert state(run, PENDING) == State("requeued", "killed. Life 2")
    assert judge(read_run(run.path, NOW), None) == State("requeued", "killed. Life 2")
    # Another life's number is newer than the queue's memory: files decide.
    assert state(run).word == "failed"


def test_a_run_whose_ranks_start_again_in_their_job_runs(run: RunFolder) -> None:
    run.life(90, job="7").end(60, 137, decision="restart", decision_reason="killed. Life 2")
    assert judge(read_run(run.path, NOW), None) == State("running", "killed. Life 2")
    assert judge(read_run(run.path, NOW + 600), None) == State("lost", "killed. Life 2")
    assert state(run) == State("lost", "killed. Life 2")  # Slurm does not know its job any more


def test_a_stop_is_asked_for(run: RunFolder) -> None:
    (run.path / "stop").touch()
    assert state(run.life(90, job="7"), RUNNING).word == "stopping"


@pytest.mark.parametrize(
    ("code", "decision", "word"),
    [(75, "", "stopped"), (75, "leave", "stopped"), (75, "give up", "failed"), (76, "", "failed")],
)
def test_after_the_end(run: RunFolder, code: int, decision: str, word: str) -> None:
    run.life(90).end(60, code, reason="because", decision=decision)
    assert state(run) == State(word, "because")


def test_a_local_run_lives_as_long_as_its_heart_beats(tmp_path: Path) -> None:
    for ago, word in ((5, "running"), (600, "lost")):
        run = RunFolder(tmp_path / str(ago), NOW).life(700).train(5, 650).hold(ago)
        found = judge(read_run(run.path, NOW), None)
        assert found.word == word
    assert found.note == "no sign of life for 0:10:00"


def test_a_life_that_has_ended_is_over_although_its_heart_beat_just_now(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run", NOW).life(700).hold(2).end(1, 75, reason="stopped")
    (run.path / "leases/00001.end").touch()
    assert judge(read_run(run.path, NOW), None) == State("stopped", "stopped")


def test_a_process_of_this_machine_is_looked_for(tmp_path: Path) -> None:
    own = Process.own()
    for number, (process, word) in enumerate(
        [(own, "running"), (replace(own, started=own.started + 1), "lost")]
    ):
        run = RunFolder(tmp_path / str(number), NOW).life(700).hold(600, process)
        assert judge(read_run(run.path, NOW), None).word == word


def test_without_a_lease_records_show_life(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run", NOW).life(9000).train(5, 100, seconds=50.0)
    facts = read_run(run.path, NOW)
    assert judge(facts, None).word == "running"
    assert judge(replace(facts, now=NOW + 100), None).word == "lost"


def test_a_job_that_failed_before_its_first_life(run: RunFolder) -> None:
    run.submitted("7", "8").life(90, job="7").end(60, 75, reason="stopped")
    assert state(run, replace(FAILED, number="8")).note == "job 8 FAILED before it began to run"
    assert state(run, FAILED) == State("stopped", "stopped")


def test_a_second_job_counts_before_one_that_is_over(run: RunFolder) -> None:
    run.submitted("7", "8")
    facts = read_run(run.path, NOW)
    assert newest_job(facts, {"7": RUNNING, "8": replace(FAILED, number="8")}) == RUNNING
    assert newest_job(facts, {"7": FAILED, "8": replace(FAILED, number="8")}).number == "8"  # type: ignore
    assert newest_job(facts, {"9": RUNNING}) is None and newest_job(facts, None) is None
