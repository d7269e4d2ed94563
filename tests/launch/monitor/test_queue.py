"""squeue is asked seldom, and what it says is read as it is."""

from __future__ import annotations

import subprocess
from itertools import pairwise

import pytest

from launch.monitor.queue import EVERY_S, Queue, parse_jobs

LINES = """\
12|12|RUNNING|1800003600|1800000000|None|n[1-2]
13|13|PENDING|N/A|2027-01-15T08:00:00|Priority|
20|19_3|RUNNING|N/A|N/A|None|n4
19|19_5|PENDING|N/A|N/A|JobArrayTaskLimit|
21|21|PENDING|N/A|N/A|DependencyNeverSatisfied|
22|22|FAILED|1800000100|1800000000|NonZeroExitCode|n3
a line of somebody's wrapper
"""


def test_jobs_by_number_and_by_task() -> None:
    jobs = parse_jobs(LINES)
    assert set(jobs) == {"12", "13", "20", "19_3", "19_5", "21", "22"}
    running = jobs["12"]
    assert (running.ends, running.starts, running.nodes) == (1.8e9 + 3600, 1.8e9, "n[1-2]")
    assert running.is_active and not running.is_pending
    assert jobs["13"].ends is None and jobs["13"].starts is not None and jobs["13"].is_pending
    assert jobs["20"] == jobs["19_3"] and jobs["20"].is_active
    assert jobs["19_5"].is_pending and not jobs["19_5"].is_held
    assert jobs["21"].is_held
    assert not jobs["22"].is_active and not jobs["22"].is_pending


def test_squeue_is_asked_once_a_minute() -> None:
    calls, now = [], [1000.0]

    def run() -> str:
        calls.append(now[0])
        return LINES

    queue = Queue(run=run, clock=lambda: now[0])
    for _ in range(200):
        assert queue.jobs()
        now[0] += 1.0
    assert len(calls) == 4 and min(b - a for a, b in pairwise(calls)) >= EVERY_S == 60


def test_off_means_never() -> None:
    def run() -> str:
        raise AssertionError

    assert Queue(is_on=False, run=run).jobs() is None


def test_no_slurm_is_no_problem_and_is_not_looked_for_again() -> None:
    calls, now = [], [0.0]

    def run() -> str:
        calls.append(1)
        raise FileNotFoundError("squeue")

    queue = Queue(run=run, clock=lambda: now[0])
    assert queue.jobs() is None and queue.problem == ""
    now[0] = 1000
    assert queue.jobs() is None and len(calls) == 1


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (subprocess.CalledProcessError(1, "squeue", stderr="no controller\n"), "no controller"),
        (subprocess.TimeoutExpired("squeue", 20), "timed out"),
    ],
)
def test_a_controller_that_does_not_answer_is_told(error: Exception, problem: str) -> None:
    def run() -> str:
        raise error

    queue = Queue(run=run)
    assert queue.jobs() is None and problem in queue.problem
