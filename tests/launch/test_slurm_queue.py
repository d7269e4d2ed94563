"""What Slurm says of a job, and what is made of it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from launch.monitor.queue import call_squeue, parse_jobs
from launch.slurm_queue import array_task, job_state, job_time_limit, parse_time_left, time_left_s


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1-02:03:04", 93784.0),
        ("23:59:59", 86399.0),
        ("12:30", 750.0),
        ("0:05", 5.0),
        ("UNLIMITED", None),
        ("NOT_SET", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_time_left(text: str, seconds: float | None) -> None:
    assert parse_time_left(text) == seconds


def fake_squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    (folder / "squeue").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_state_and_limit_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = 'case "$*" in *%T*) echo 17 RUNNING;; *"jobs=17 --format=%A %L"*) echo 17 10:00;; esac'
    fake_squeue(tmp_path, monkeypatch, body)
    assert job_state("17") == "RUNNING" and time_left_s("17") == 600
    limit = job_time_limit({"SLURM_JOB_ID": "17"})
    assert limit is not None and abs(limit - time.time() - 600) < 60
    assert job_time_limit({"SLURM_JOB_ID": "17", "SLURM_JOB_END_TIME": "1234"}) == 1234.0
    assert job_time_limit({"SLURM_JOB_END_TIME": "1234"}) is None


@pytest.mark.parametrize(
    ("body", "state"),
    [
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", ""),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", None),
    ],
)
def test_a_job_that_is_gone_and_a_slurm_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, state: str | None
) -> None:
    fake_squeue(tmp_path, monkeypatch, body)
    assert job_state("17") == state
    assert time_left_s("17") is None


@pytest.mark.parametrize(
    ("job", "state"), [("17", "RUNNING"), ("19", "COMPLETING"), ("17_2", "PENDING"), ("20", "")]
)
def test_the_number_of_an_array_is_also_that_of_its_last_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, state: str
) -> None:
    tasks = "echo 19 COMPLETING; echo 17 RUNNING; echo 18 PENDING"
    body = f'case "$*" in *jobs=17_2*) echo 18 PENDING;; *) {tasks};; esac'
    fake_squeue(tmp_path, monkeypatch, body)
    assert job_state(job) == state


def test_a_users_filters_hide_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    line = "17|17|PENDING|N/A|N/A|Priority|"
    body = '[ -z "$SQUEUE_STATES" ] || exit 0; case "$*" in *jobs*) echo 17 PENDING ;;'
    fake_squeue(tmp_path, monkeypatch, f"{body} *) echo '{line}' ;; esac")
    assert job_state("17") == "PENDING"
    assert [job.number for job in parse_jobs(call_squeue()).values()] == ["17"]


def test_a_task_of_an_array_is_named_alone() -> None:
    task = {"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2"}
    assert array_task(task) == "17_2"
    assert array_task({"SLURM_JOB_ID": "17"}) == "17"
    assert array_task({}) is None


def test_without_slurm_nobody_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_state("17") is None and time_left_s("17") is None
