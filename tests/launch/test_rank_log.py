"""A rank's log holds what it said, also its last words, and the run never depends on it."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch import rank_log

ROOT = Path(__file__).resolve().parents[2]
RANK = """
import os, signal, sys
from launch import rank_log
from launch.rendezvous import Rendezvous
from trainer.errors import DataError
run_dir, how, launcher = sys.argv[1:]
with rank_log.kept({"run_dir": run_dir}, Rendezvous(3, 4, 3, 4, "host", 1, launcher)):
    print("terminal" if sys.stdout.isatty() else "file", flush=True)
    sys.stderr.write("bar 1\\r\\x1b[2Kbar 2\\r\\x1b[2K\\x1b[1mnote\\x1b[0m\\n")
    sys.stderr.flush()
    os.write(2, b"last words")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raise":
        raise ValueError("unexpected")
    if how == "refuse":
        raise DataError("no rows")
print("outside")
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").touch()
    return tmp_path


def rank(run_dir: Path, how: str, launcher: str = "local") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RANK, str(run_dir), how, launcher]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)


def log_of(run_dir: Path) -> list[str]:
    lines = rank_log.rank_log(run_dir, 3).read_text().splitlines()
    assert lines[0].startswith("--- 20") and " rank 3 of 4, process " in lines[0]
    return lines[1:]


def test_last_words_of_a_killed_rank(run_dir: Path) -> None:
    done = rank(run_dir, "kill")
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == "file\n" and done.stderr.endswith("note\x1b[0m\nlast words")
    assert sorted(log_of(run_dir)) == ["file", "last words", "note"]


def test_errors_are_in_the_log_and_lives_are_appended(run_dir: Path) -> None:
    assert rank(run_dir, "raise").returncode == 1
    assert log_of(run_dir)[-1] == "ValueError: unexpected"
    assert rank(run_dir, "refuse").returncode == 1
    lines = log_of(run_dir)
    assert lines[-1] == "kuroshio: no rows" and "ValueError: unexpected" in lines
    assert sum(line.startswith("--- ") for line in lines) == 1  # log_of took the first


def test_output_outside_is_not_kept(run_dir: Path) -> None:
    assert rank(run_dir, "end").stdout == "file\noutside\n"
    assert "outside" not in log_of(run_dir)


def test_a_terminal_stays_a_terminal(run_dir: Path) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-c", RANK, str(run_dir), "end", "plain"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environ, stdout=slave, stderr=slave, check=True, timeout=60)
    os.close(slave)
    shown = b""
    try:
        while block := os.read(master, 65536):
            shown += block
    except OSError:  # nobody writes any more
        os.close(master)
    assert b"terminal" in shown and b"bar 2" in shown and b"outside" in shown
    assert sorted(log_of(run_dir)) == ["last words", "note", "terminal"]


@pytest.mark.parametrize("launcher", ["slurm", "mpi"])
def test_launchers_with_logs_of_their_own(run_dir: Path, launcher: str) -> None:
    assert rank(run_dir, "end", launcher).stdout == "file\noutside\n"
    assert not (run_dir / "logs").exists()


def test_a_run_that_does_not_exist_writes_nothing(tmp_path: Path) -> None:
    assert "last words" in rank(tmp_path, "refuse").stderr
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_cannot_be_written_costs_nothing(run_dir: Path) -> None:
    (run_dir / "logs").write_text("in the way")
    done = rank(run_dir, "end")
    assert done.returncode == 0 and done.stdout == "file\noutside\n"
    assert done.stderr.count("is not written any more") == 1 and "last words" in done.stderr


def test_clean_line_keeps_what_a_terminal_shows_at_last() -> None:
    assert rank_log.clean_line(b"a\rb\r\x1b[31mc\x1b[0m\r") == b"c\n"
    assert rank_log.clean_line("甲\r\n".encode()) == "甲\n".encode()
