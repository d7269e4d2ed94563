"""What `kuroshio watch` says of single ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from run_folders import RunFolder

from launch.monitor.row import build_row
from trainer import heartbeat
from trainer.heartbeat import Beat
from trainer.metrics.run_facts import RunFacts, read_run

NOW = 1_900_000_000.0


def leave_beat(run: RunFolder, rank: int, ago: float, **facts: Any) -> None:
    """Write the heartbeat of a rank that is ``ago`` seconds old."""
    values = {"step": 40, "phase": "step", "idle_s": 1.0, "where": "", "waits": False} | facts
    path = heartbeat.start_files(run.path, 1, rank)
    heartbeat.write_beat(path, Beat(rank, f"n{rank}", 7, 1, 9, time=NOW - ago, **values))
    os.utime(path, (NOW - ago, NOW - ago))


def read(run: RunFolder) -> RunFacts:
    return read_run(run.path, NOW)


def begin(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run", NOW).life(900).hold(5).train(40, 30)


def test_a_silent_rank_and_those_that_wait_are_said(tmp_path: Path) -> None:
    run = begin(tmp_path)
    leave_beat(run, 0, 2, idle_s=95.0, waits=True)
    leave_beat(run, 1, 97)
    leave_beat(run, 2, 1, idle_s=95.0, waits=True)
    assert build_row(read(run), None).ranks == [
        "no progress: rank 1 on n1 is silent for 97 s (step 40, phase step); 2 ranks wait for "
        "others after step 40"
    ]


def test_ranks_that_get_on_need_no_word(tmp_path: Path) -> None:
    run = begin(tmp_path)
    leave_beat(run, 0, 2)
    leave_beat(run, 1, 20, phase=heartbeat.LEFT)
    assert build_row(read(run), None).ranks == []


def test_beats_of_an_ended_life_say_nothing(tmp_path: Path) -> None:
    run = begin(tmp_path)
    leave_beat(run, 0, 500)
    (run.path / "leases/00001.end").touch()
    assert read(run).beats == []


def test_the_slowest_rank_is_said_if_it_matters(tmp_path: Path) -> None:
    run = begin(tmp_path)
    slow = {"rank": 3, "host": "n2", "seconds": 0.9, "data_seconds": 0.6}
    record = {"split": "ranks", "step": 40, "time": NOW - 30, "slowest": [slow]}
    run.write("metrics.jsonl", record | {"median_s": 0.4})
    assert build_row(read(run), None).ranks == [
        "rank 3 on n2 is the slowest: 0.90 s a step by itself, 0.60 s of it for data; the median "
        "rank 0.40 s"
    ]
    run.write("metrics.jsonl", record | {"median_s": 0.85})
    assert build_row(read(run), None).ranks == []
