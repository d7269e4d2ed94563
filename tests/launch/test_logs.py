"""`kuroshio logs`: the ends of the right files."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from run_folders import RunFolder

from launch.logs import BLOCK_BYTES, POLL_S, find_last_lines, main
from trainer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run", time.time())
    logs = run.path / "logs"
    logs.mkdir()
    for name, num_lines in (("rank_00000.log", 100), ("rank_00003.log", 3)):
        lines = "".join(f"{name} line {number} 黑潮\n" for number in range(num_lines))
        (logs / name).write_text(lines, encoding="utf-8")
    for age, job in ((100, 7), (0, 12), (50, 9)):
        (logs / f"job-{job}.out").write_text(f"job {job}\n")
        os.utime(logs / f"job-{job}.out", (time.time() - age,) * 2)
    return run


def test_newest_job_and_rank_0(run: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([str(run.path), "--lines", "2"]) == 0
    logs = run.path / "logs"
    assert capfd.readouterr().out == (
        f"==> {logs}/job-12.out <==\njob 12\n\n==> {logs}/rank_00000.log <==\n"
        "rank_00000.log line 98 黑潮\nrank_00000.log line 99 黑潮\n"
    )


def test_the_rank_that_ended_the_last_life(
    run: RunFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    run.life(60).end(10, 76, rank=3, reason="loss is NaN")
    main([str(run.path)])
    out = capfd.readouterr().out
    assert "rank_00003.log line 0" in out and "rank_00000" not in out


def test_one_rank(run: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    main([str(run.path), "--rank", "3"])
    assert capfd.readouterr().out == "".join(f"rank_00003.log line {n} 黑潮\n" for n in range(3))
    with pytest.raises(ConfigError, match=r"--rank=2: .* no log of it; .* 2 ranks, 0 to 3"):
        main([str(run.path), "--rank", "2"])
    with pytest.raises(SystemExit):
        main([str(run.path), "--rank", "-1"])


def test_a_run_without_logs(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run", 0)
    with pytest.raises(ConfigError, match=r"has no log; a job that waits has none yet"):
        main([str(run.path)])
    with pytest.raises(ConfigError, match=r"not the folder of a run"):
        main([str(tmp_path)])


def test_a_log_without_a_line_yet(run: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    (run.path / "logs" / "rank_00001.log").touch()
    assert main([str(run.path), "--rank", "1"]) == 0
    assert capfd.readouterr() == ("", f"{run.path}/logs/rank_00001.log: nothing yet\n")


def test_a_job_that_is_no_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "job-5.out").write_text("exported\n")
    assert main([str(tmp_path)]) == 0
    assert capfd.readouterr().out == "exported\n"


@pytest.mark.parametrize("end", ["\n", ""])
def test_last_lines_of_long_files(tmp_path: Path, end: str) -> None:
    path, lines = tmp_path / "log", [f"{n} " + "x" * (n % 997) for n in range(900)]
    path.write_text("\n".join(lines) + end)
    assert path.stat().st_size > 3 * BLOCK_BYTES
    for num_lines in (0, 1, 2, 500, 899, 900, 2000):
        rest = path.read_bytes()[find_last_lines(path, num_lines) :].decode()
        assert rest.splitlines() == lines[len(lines) - min(num_lines, 900) :], num_lines
    path.write_text("")
    assert find_last_lines(path, 5) == 0


def test_follow(run: RunFolder) -> None:
    command = [sys.executable, "-m", "launch", "logs", str(run.path), "--rank", "3", "--follow"]
    log = run.path / "logs" / "rank_00003.log"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        # A line that never comes must fail the test, not hold it.
        timer = threading.Timer(60, process.kill)
        timer.start()
        for number in range(3):
            assert process.stdout.readline().decode() == f"rank_00003.log line {number} 黑潮\n"
        with log.open("a") as file:
            file.write("later\n")
        assert process.stdout.readline() == b"later\n"
        log.write_text("anew\n")  # shorter than before
        assert process.stdout.readline() == b"anew\n"
        log.unlink()
        time.sleep(2 * POLL_S)
        log.write_text("again and longer\n")
        assert process.stdout.readline().endswith(b"longer\n")
        timer.cancel()
        process.terminate()
