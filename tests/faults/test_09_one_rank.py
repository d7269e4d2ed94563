"""Row 9: one rank alone fails; the others end with it within seconds, and say who and why."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulty_runs import ROOT, Ended, make_ppo, run_with_fault
from training_fixtures import varying

from launch.rendezvous import free_port
from trainer.errors import DataError, LostRankError
from trainer.lives import newest_step, read_lives

pytestmark = [pytest.mark.slow, pytest.mark.faults(row=9)]
DOWN_S = 20.0
HOST = socket.gethostname()
Vary = Callable[..., dict[str, Any]]


def check_life(run_dir: Path, code: int, point: str) -> None:
    """Check that the failing rank's words are those of the run."""
    [life] = read_lives(run_dir)
    assert life["rank"] == 1 and f"KUROSHIO_FAULT: {point} " in life["reason"], life
    assert life["exit_code"] == code


def check_end(run_dir: Path, ended: Ended, code: int, point: str) -> None:
    """Check how `kuroshio run` ended: it ends the others itself, and shows who failed and why."""
    assert ended.code == code and ended.still_s < DOWN_S, ended.output
    assert f"kuroshio: rank 1 exited {code}; ending the others" in ended.output
    words = [line for line in ended.output.splitlines() if line.startswith("[rank 1] ")]
    assert any(f"KUROSHIO_FAULT: {point} " in line for line in words), ended.output
    check_life(run_dir, code, point)


@pytest.mark.parametrize(
    ("point", "error", "code"),
    [
        ("data", "DataError", DataError.exit_code),
        ("loss", "RuntimeError", 1),
        ("evaluation", "RuntimeError", 1),
    ],
)
def test_others_end_with_a_rank_that_fails(
    vary: Vary, tmp_path: Path, point: str, error: str, code: int
) -> None:
    changes = {"loop__save_every": 2, "loop__eval_every": 4, "loop__eval_chars": 500}
    config = vary(tmp_path / "run", loop__save_async=False, **changes)
    ended = run_with_fault(config, 2, f"raise@{point} rank=1 step=4 error={error}")
    check_end(tmp_path / "run", ended, code, point)
    assert newest_step(tmp_path / "run") == (2 if point == "evaluation" else 4)


def test_a_rank_that_fails_in_an_update_of_ppo(dpo_config: dict[str, Any], tmp_path: Path) -> None:
    config = varying(make_ppo(dpo_config))(tmp_path / "run", loop__max_steps=3)
    ended = run_with_fault(config, 2, "raise@update rank=1 step=1 error=DataError")
    check_end(tmp_path / "run", ended, DataError.exit_code, "update")


def test_ranks_without_a_parent_end_each_other(vary: Vary, tmp_path: Path) -> None:
    """As torchrun and srun start them: nobody watches but the ranks themselves."""
    run_dir, path = tmp_path / "run", tmp_path / "run.json"
    values = vary(run_dir, loop__save_every=2)
    values["cluster"] = {"gpus_per_node": 2}
    path.write_text(json.dumps(values))
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environ |= {"MASTER_PORT": str(free_port()), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "1"}
    environ |= {"KUROSHIO_FAULT": "raise@data rank=1 step=3 error=DataError"}
    command = [sys.executable, "-m", "launch", "run", "--config", str(path)]
    ranks = [
        subprocess.Popen(
            command,
            env=environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        ranks[1].communicate(timeout=240)
        failed = time.monotonic()
        output, _ = ranks[0].communicate(timeout=DOWN_S)
        assert time.monotonic() - failed < DOWN_S
    finally:
        for process in ranks:
            process.kill()
    codes = [process.returncode for process in ranks]
    assert codes == [LostRankError.exit_code, DataError.exit_code], output
    said = f"rank 1 on {HOST} failed: KUROSHIO_FAULT: data "
    assert said in output and "rank 0 lost contact with another rank" in output, output
    check_life(run_dir, DataError.exit_code, "data")
