"""Who may live in a run folder, and how a life's end is recorded."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.tenancy import life_sign, record_end, recorded_stay, take_lease
from trainer.errors import (
    DataError,
    LeaseError,
    LostRankError,
    StopRequestedError,
)
from trainer.lease import Holder, Lease, Process, lease_path, read_holder
from trainer.lives import append_line, read_lives

ALIVE = Process.own()
DEAD = dataclasses.replace(ALIVE, started=ALIVE.started + 1)
ELSEWHERE = dataclasses.replace(ALIVE, boot="another")
NOW = 1000.0
HOLDER = Holder(3, "n1", "17", 1, ELSEWHERE, "2026-01-01T00:00:00+00:00", NOW - 5, False)


def never(job: str) -> str | None:
    raise AssertionError(f"Slurm was asked for {job}")


@pytest.mark.parametrize(
    ("changes", "own", "state", "expected"),
    [
        ({"has_ended": True}, ("18", 0), "never", ""),
        ({}, ("17", 2), "never", ""),  # requeued: the life before was ended or given up
        ({}, ("17", 1, 1), "never", ""),  # started again in its job: srun has ended them
        ({"attempt": 1, "process": ALIVE}, ("17", 1, 0), "never", "its process PID runs"),
        ({}, ("18", 0), "RUNNING", "its Slurm job is RUNNING"),
        ({}, ("18", 0), "PENDING", ""),  # between two of its lives
        ({}, ("18", 0), "", ""),  # Slurm has forgotten it: what is left of it is fenced off
        ({}, (None, 0), "SUSPENDED", "its Slurm job is SUSPENDED"),
        ({}, ("18", 0), None, "its last heartbeat is 5 s old"),
        ({"heartbeat": NOW - 61}, ("18", 0), None, ""),
        ({"heartbeat": NOW + 9}, ("18", 0), None, "its last heartbeat is 0 s old"),
        ({"process": ALIVE}, ("17", 1), "never", "its process PID runs"),
        ({"process": DEAD}, ("17", 1), "never", ""),  # a second srun after the first was killed
        ({"job": None, "process": DEAD}, (None, 0), "never", ""),
        ({"job": None, "process": ALIVE}, ("18", 0), "never", "its process PID runs"),
        ({"job": None}, (None, 0), "never", "its last heartbeat is 5 s old"),
    ],
)
def test_what_shows_that_a_life_goes_on(
    changes: dict, own: tuple, state: str | None, expected: str
) -> None:
    holder = dataclasses.replace(HOLDER, **changes)
    life = dict(zip(("job", "restart", "attempt"), own, strict=False))
    ask = never if state == "never" else lambda job: state
    assert life_sign(holder, life, NOW, ask) == expected.replace("PID", str(os.getpid()))


def test_a_living_folder_is_refused_naming_job_and_host(tmp_path: Path) -> None:
    first = take_lease(tmp_path, {"SLURM_JOB_ID": "17"}, never)
    assert first.token == 1
    with pytest.raises(LeaseError) as caught:
        take_lease(tmp_path, {"SLURM_JOB_ID": "18"}, lambda job: "RUNNING")
    message = str(caught.value)
    host = read_holder(tmp_path).host
    assert f"run_dir={tmp_path} is in use: Slurm job 17 on {host}" in message
    assert "kuroshio stop" in message and "scancel 17" in message
    again = take_lease(tmp_path, {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "1"}, never)
    assert again.token == 2
    with pytest.raises(LeaseError):
        first.check()


@pytest.mark.parametrize(("states", "polls"), [([""], 0), (["COMPLETING"] * 3 + [""], 3)])
def test_a_job_that_is_being_ended_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states: list[str], polls: int
) -> None:
    take_lease(tmp_path, {"SLURM_JOB_ID": "17"}, never)
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    assert take_lease(tmp_path, {"SLURM_JOB_ID": "18"}, lambda job: states.pop(0)).token == 2
    assert len(slept) == polls


def test_a_job_that_hangs_in_its_end_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_lease(tmp_path, {"SLURM_JOB_ID": "17"}, never)
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    assert take_lease(tmp_path, {"SLURM_JOB_ID": "18"}, lambda job: "COMPLETING").token == 2
    assert sum(slept) == 60


def take_elsewhere(folder: Path) -> None:
    """Leave the lease of a job in another namespace, as an image may be."""
    take_lease(folder, {"SLURM_JOB_ID": "17"}, never)
    path = lease_path(folder, 1)
    data = json.loads(path.read_text()) | {"process": dataclasses.asdict(ELSEWHERE)}
    path.write_text(json.dumps(data))


def test_a_heartbeat_that_has_stopped_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Slurm cannot be asked, a job killed a moment ago must not end the one after it."""
    take_elsewhere(tmp_path)
    clock = [lease_path(tmp_path, 1).stat().st_mtime]
    monkeypatch.setattr("launch.tenancy._file_system_time", lambda run_dir: clock[0])
    monkeypatch.setattr("time.sleep", lambda s: clock.append(clock.pop() + s))
    start = clock[0]
    assert take_lease(tmp_path, {"SLURM_JOB_ID": "18"}, lambda job: None).token == 2
    assert clock[0] - start == 60


def test_a_heartbeat_that_goes_on_is_refused_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_elsewhere(tmp_path)
    slept: list[float] = []

    def beat(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            os.utime(lease_path(tmp_path, 1), (10**9, 10**9))

    monkeypatch.setattr("launch.tenancy._file_system_time", lambda run_dir: 10.0**9)
    monkeypatch.setattr("time.sleep", beat)
    with pytest.raises(LeaseError, match="its last heartbeat is 0 s old"):
        take_lease(tmp_path, {"SLURM_JOB_ID": "18"}, lambda job: None)
    assert len(slept) == 3


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    code = "import sys, os, signal; from pathlib import Path; from launch.tenancy import *\n"
    code += "take_lease(Path(sys.argv[1]), {}); os.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[2]
    )
    assert done.returncode == -9
    assert take_lease(tmp_path, {}, never).token == 2


def test_the_first_to_say_how_a_life_ended_is_believed(tmp_path: Path) -> None:
    lease = take_lease(tmp_path, {}, never)
    append_line(tmp_path, {"started": "now", "token": lease.token})
    assert record_end(tmp_path, 1, {}, exit_code=65, reason="a bad row", rank=3)
    assert not record_end(tmp_path, 1, {}, exit_code=69, reason="lost contact", rank=0)
    [life] = read_lives(tmp_path)
    assert (life["exit_code"], life["reason"], life["rank"], life["step"]) == (
        65,
        "a bad row",
        3,
        0,
    )
    assert take_lease(tmp_path, {}, never).token == 2  # at once: it said that it has ended


def end_with(folder: Path, error: BaseException | None, rank: int, lease: Lease | None) -> None:
    with recorded_stay(folder, rank) as stay:
        stay.lease = lease
        if error:
            raise error


@pytest.mark.parametrize(
    ("error", "rank", "expected"),
    [
        (None, 0, (0, "finished", "")),
        (None, 1, None),
        (DataError("no rows"), 1, (65, "no rows", "")),
        (LostRankError("gone"), 1, None),
        (LostRankError("rank 0 is gone", names_rank=True), 1, (69, "rank 0 is gone", "")),
        (LostRankError("gone"), 0, (69, "gone", "")),
        (SystemExit(75), 0, (75, "stopped by a signal before the first step", "")),
        (KeyError("x"), 2, (1, "KeyError: 'x'", "")),
    ],
)
def test_a_rank_says_how_it_ended(
    tmp_path: Path, error: BaseException | None, rank: int, expected: tuple | None
) -> None:
    lease = take_lease(tmp_path, {}, never)
    if error is None:
        end_with(tmp_path, error, rank, lease)
    else:
        with pytest.raises(type(error)):
            end_with(tmp_path, error, rank, lease)
    found = [(life["exit_code"], life["reason"], life["cause"]) for life in read_lives(tmp_path)]
    assert found == ([expected] if expected else [])


def test_a_stop_is_recorded_with_its_cause(tmp_path: Path) -> None:
    lease = take_lease(tmp_path, {}, never)
    with pytest.raises(StopRequestedError):
        end_with(tmp_path, StopRequestedError(4, "SIGUSR1"), 0, lease)
    [life] = read_lives(tmp_path)
    assert (life["exit_code"], life["cause"]) == (75, "SIGUSR1")


def test_a_fenced_life_records_nothing(tmp_path: Path) -> None:
    old = take_lease(tmp_path, {"SLURM_JOB_ID": "17"}, never)
    take_lease(tmp_path, {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "1"}, never)
    with pytest.raises(LeaseError), recorded_stay(tmp_path, 0) as stay:
        stay.lease = old
        old.check()
    assert read_lives(tmp_path) == [] and not lease_path(tmp_path, 1).with_suffix(".end").exists()


def test_a_job_that_was_refused_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    with pytest.raises(LeaseError):
        end_with(tmp_path, LeaseError("in use"), 0, None)
    [life] = read_lives(tmp_path)
    assert (life["job"], life["token"], life["exit_code"]) == ("18", None, 73)
    missing = tmp_path / "missing"
    with pytest.raises(DataError):
        end_with(missing, DataError("x"), 0, None)
    assert not missing.exists()
