"""Ranks on this machine, without torch: exit codes, output, signals, nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import local
from launch.local import run_ranks, threads_per_rank
from trainer.errors import EXIT_RESUME, LostRankError

ROOT = Path(__file__).resolve().parents[2]
PREAMBLE = """
import os, sys, time, signal
rank = int(os.environ["RANK"])
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
"""


def rank_command(body: str) -> list[str]:
    return [sys.executable, "-c", PREAMBLE + body]


def run_body(body: str, num_ranks: int = 2, stdin: str = "") -> int:
    return run_ranks(rank_command(body), num_ranks, stdin)


@pytest.fixture(autouse=True)
def no_leftovers() -> None:
    """Check after every test that no child process of ours is left, not even a zombie."""
    yield
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_every_rank_finds_its_place_and_its_config(tmp_path: Path) -> None:
    body = (
        f"keys = 'RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR'.split()\n"
        f"text = ' '.join([*(os.environ[k] for k in keys), sys.stdin.read()])\n"
        f"open('{tmp_path}/' + str(rank), 'w').write(text)"
    )
    assert run_body(body, 3, "the config") == 0
    texts = [(tmp_path / str(rank)).read_text() for rank in range(3)]
    assert texts == [f"{rank} 3 {rank} 3 127.0.0.1 the config" for rank in range(3)]


def test_ranks_meet_at_one_port_and_share_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    body = (
        f"text = os.environ['MASTER_PORT'] + ' ' + os.environ['OMP_NUM_THREADS']\n"
        f"open('{tmp_path}/' + str(rank), 'w').write(text)"
    )
    assert run_body(body) == 0
    first, second = ((tmp_path / str(rank)).read_text() for rank in (0, 1))
    assert first == second
    assert first.split()[1] == str(max(1, len(os.sched_getaffinity(0)) // 2))


def test_threads_the_user_or_slurm_set_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
    assert threads_per_rank(8) == 12
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert run_body("sys.exit(os.environ['OMP_NUM_THREADS'] != '3')") == 0


def test_output_of_later_ranks_carries_their_number(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_body("print('one\\ntwo', rank)") == 0
    out, err = capfd.readouterr()
    assert out == "one\ntwo 0\n"
    assert err == "[rank 1] one\n[rank 1] two 1\n"


def test_the_last_words_of_a_failing_rank_are_printed(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_body("rank and sys.exit('x' * 100_000 + ' end')\ntime.sleep(60)") == 1
    assert " end\n" in capfd.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_one_failure_ends_all_and_gives_the_exit_code(
    rank: int, capfd: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    assert run_body(f"rank == {rank} and sys.exit(65)\ntime.sleep(60)") == 65
    assert time.monotonic() - started < 10
    assert f"kuroshio: rank {rank} exited 65; ending the others" in capfd.readouterr().err


def test_a_killed_rank_is_named_with_its_signal(capfd: pytest.CaptureFixture[str]) -> None:
    body = "rank == 1 and os.kill(os.getpid(), signal.SIGSEGV)\ntime.sleep(60)"
    assert run_body(body) == 128 + signal.SIGSEGV
    assert "rank 1 was killed by SIGSEGV" in capfd.readouterr().err


def test_a_rank_that_lost_its_peer_is_not_blamed(capfd: pytest.CaptureFixture[str]) -> None:
    lost = LostRankError.exit_code
    assert run_body(f"sys.exit({lost} if rank == 0 else (time.sleep(0.2), 76)[1])") == 76
    assert "rank 1 exited 76" in capfd.readouterr().err


def test_ranks_that_ignore_the_end_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "GRACE_S", 0.2)
    body = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "rank == 1 and (time.sleep(0.3), sys.exit(65))\ntime.sleep(60)"
    )
    started = time.monotonic()
    assert run_body(body) == 65
    assert time.monotonic() - started < 10


def test_resume_me_is_passed_on() -> None:
    assert run_body(f"sys.exit({EXIT_RESUME})") == EXIT_RESUME
    assert run_body(f"rank and sys.exit({EXIT_RESUME})") == EXIT_RESUME


def test_a_rank_hanging_after_the_others_left_is_ended(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "LINGER_S", 0.2)
    assert run_body(f"rank or sys.exit({EXIT_RESUME})\ntime.sleep(60)") == EXIT_RESUME
    assert "ranks [1] hang" in capfd.readouterr().err


def test_a_command_that_does_not_exist_leaves_no_process() -> None:
    with pytest.raises(FileNotFoundError):
        run_ranks(["/nonexistent/python"], 2, "")


def test_an_early_signal_waits_until_the_ranks_can_handle_it(tmp_path: Path) -> None:
    body = (
        f"open('{tmp_path}/' + str(rank), 'w').close()\n"
        "time.sleep(0.5)\n"
        f"signal.signal(signal.SIGTERM, lambda n, f: sys.exit({EXIT_RESUME}))\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])\ntime.sleep(60)"
    )
    command = [
        sys.executable,
        "-c",
        "import os, sys, time, signal\nrank = os.environ['RANK']\n" + body,
    ]
    parent = start_parent(command)
    wait_for_files(tmp_path, 2)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(20) == EXIT_RESUME


def start_parent(command: list[str]) -> subprocess.Popen[bytes]:
    code = (
        f"import sys; from launch.local import run_ranks\nsys.exit(run_ranks({command!r}, 2, ''))"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)


def wait_for_files(folder: Path, number: int) -> None:
    deadline = time.monotonic() + 20
    while len(list(folder.iterdir())) < number:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_second_interrupt_kills(tmp_path: Path) -> None:
    body = (
        "signal.signal(signal.SIGINT, lambda n, f: None)\n"
        f"open('{tmp_path}/' + str(rank), 'w').close()\n"
        "while True: time.sleep(0.05)"
    )
    parent = start_parent(rank_command(body))
    wait_for_files(tmp_path, 2)
    parent.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert parent.poll() is None
    parent.send_signal(signal.SIGINT)
    assert parent.wait(20) == 128 + signal.SIGKILL
