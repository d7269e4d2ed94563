"""Why a rank stops: a signal, the stop file, the time limit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from trainer import signals
from trainer.deadline import Deadline
from trainer.errors import EXIT_RESUME, STOP_FILE_CAUSE
from trainer.signals import StopRequest


def test_a_signal_inside_the_block_is_a_request() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest().listening() as stop:
        assert not stop.requested and not stop.agreed("step")
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested and stop.agreed("step")
    assert signal.getsignal(signal.SIGUSR1) == before
    error = stop.honoured(4)
    assert (error.cause, error.exit_code) == ("SIGUSR1", EXIT_RESUME)
    assert "stopped by SIGUSR1 after step 4" in str(error)


def test_the_stop_file_is_seen_and_removed_when_honoured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "POLL_S", 0.0)
    path = tmp_path / "stop"
    stop = StopRequest(path)
    assert not stop.requested
    path.touch()
    assert stop.requested and path.exists()
    assert stop.honoured(7).cause == STOP_FILE_CAUSE and not path.exists()


def test_the_file_is_looked_for_once_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Path] = []
    monkeypatch.setattr(Path, "exists", lambda path: bool(looks.append(path)))
    stop = StopRequest(tmp_path / "stop")
    assert not any(stop.requested for _ in range(1000))
    assert len(looks) == 1


def test_a_signal_first_leaves_the_stop_file_to_the_next_life(tmp_path: Path) -> None:
    path = tmp_path / "stop"
    with StopRequest(path).listening() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        path.touch()
        assert stop.requested
    assert stop.honoured(1).cause == "SIGTERM" and path.exists()


def test_no_step_is_begun_that_would_not_end_and_the_decision_stays() -> None:
    now = 1000.0
    deadline = Deadline(1100.0, lambda: now)
    deadline.expect({"step": 60.0, "evaluation": 1.0, "save": 10.0})
    stop = StopRequest(None, deadline)
    assert not stop.requested and not stop.agreed("evaluation")
    assert stop.agreed("step")
    assert stop.agreed("evaluation") and stop.requested
    assert "the time limit (100 s left" in str(stop.honoured(3))
