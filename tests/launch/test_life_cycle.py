"""One run through a second claim, stops, a time limit and a newer life, by its real commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import EXIT_RESUME, STOP_FILE_CAUSE, LeaseError
from trainer.lease import Lease, read_holder
from trainer.lives import newest_step, read_lives

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300
LIMIT_S = 90

pytestmark = pytest.mark.slow


@pytest.fixture
def run_dir(vary: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    """Return the folder of a run that would take hours."""
    changes = {"loop__max_steps": 100_000, "loop__eval_chars": 0, "log__wandb": "off"}
    config = vary(tmp_path / "run", **changes)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(json.dumps(config))
    return tmp_path / "run"


def start(run_dir: Path, **environ: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch", "run", "--config", str(run_dir / "config.yaml")]
    own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environ}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=own, cwd=ROOT, text=True, **pipes)


def last_trained(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    return max((r["step"] for r in records if r["split"] == "train"), default=0)


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while last_trained(run_dir) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_run_is_left_to_one_life_and_ends_as_it_was_asked(run_dir: Path) -> None:
    (run_dir / "stop").touch()  # nobody was there to honour it: whoever starts the run wants it
    first = start(run_dir)
    wait_for_step(run_dir, 2, first)
    second = start(run_dir)
    output = second.communicate(timeout=TIMEOUT_S)[0]
    assert second.returncode == LeaseError.exit_code
    assert f"run_dir={run_dir} is in use: process {first.pid}" in output
    (run_dir / "stop").touch()
    output = first.communicate(timeout=TIMEOUT_S)[0]
    assert first.returncode == EXIT_RESUME, output
    assert not (run_dir / "stop").exists() and newest_step(run_dir) == last_trained(run_dir)
    [life] = read_lives(run_dir)
    assert (life["cause"], life["exit_code"], life["step"]) == (
        STOP_FILE_CAUSE,
        EXIT_RESUME,
        newest_step(run_dir),
    )

    before, limit = newest_step(run_dir), time.time() + LIMIT_S
    limited = start(run_dir, SLURM_JOB_ID="17", SLURM_JOB_END_TIME=f"{limit:.0f}")
    output = limited.communicate(timeout=TIMEOUT_S)[0]
    assert limited.returncode == EXIT_RESUME and time.time() < limit, output
    assert "stopped by the time limit" in output and newest_step(run_dir) > before
    assert read_lives(run_dir)[-1]["cause"].startswith("the time limit")

    before = newest_step(run_dir)
    zombie = start(run_dir, SLURM_JOB_ID="17", SLURM_RESTART_COUNT="1")
    wait_for_step(run_dir, before + 2, zombie)
    for path in run_dir.rglob("*"):  # checkpoints, logs, lives, leases: nobody else's business
        assert path.name == "config.yaml" or path.stat().st_mode & 0o077 == 0, path
    holder = read_holder(run_dir)
    assert holder and Lease.take(run_dir, holder.token + 1, {"job": "17", "restart": 2}, "now")
    output = zombie.communicate(timeout=TIMEOUT_S)[0]
    assert zombie.returncode == LeaseError.exit_code, output
    assert f"belongs to life {holder.token + 1} (Slurm job 17" in output
    assert newest_step(run_dir) == before and "ended" not in read_lives(run_dir)[-1]
