"""Row 1: a rank is killed in the middle of a step; also finds the rank that was slow until then."""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulty_runs import Ended, make_ppo, run_with_fault
from training_fixtures import varying
from training_support import largest_difference, read_losses, read_masters, run_scenarios

from trainer.lives import newest_step, read_lives
from trainer.metrics.rank_report import tabulate_ranks

pytestmark = [pytest.mark.slow, pytest.mark.faults(row=1)]

DOWN_S = 30.0
SLOW_S = 1.2  # longer than from beat to beat: a dead rank's last one is of its last step
HOST = socket.gethostname()
Vary = Callable[..., dict[str, Any]]


def check_killed(run_dir: Path, ended: Ended, step: int, phases: str) -> None:
    """Check that a killed run was down soon, and that the line about it names who was where."""
    assert ended.code == 128 + signal.SIGKILL, ended.output
    assert ended.still_s < DOWN_S
    where = rf"\(it was on {HOST}, step {step}, phase ({phases})\)"
    said = f"rank 1 was killed by SIGKILL; ending the others {where}"
    assert re.search(said, ended.output), ended.output
    [life] = read_lives(run_dir)
    assert f"rank 1 on {HOST} is silent" in life["reason"] and f"step {step}" in life["reason"]


def check_slowest(run_dir: Path) -> None:
    """Check that the slow rank was found by its loading."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    records = [record for record in lines if record["split"] == "ranks"]
    [rank, host, num_slowest, _, data_s, more_s] = tabulate_ranks(records)[0]
    assert (rank, host, num_slowest) == (1, HOST, len(records))
    assert data_s > SLOW_S and more_s > SLOW_S / 2


def test_a_killed_rank_is_named_and_costs_nothing_but_time(
    vary: Vary, dpo_config: dict[str, Any], tmp_path: Path
) -> None:
    changes = {"loop__max_steps": 5, "loop__save_every": 2, "loop__save_async": False}
    vary_ppo = varying(make_ppo(dpo_config))
    killed = [vary(tmp_path / "pretrain", **changes), vary_ppo(tmp_path / "ppo", **changes)]
    whole = [vary(tmp_path / "pretrain_whole", **changes)]
    whole += [vary_ppo(tmp_path / "ppo_whole", **changes)]
    slow = f"slow@data rank=1 seconds={SLOW_S}"
    ended = run_with_fault(killed[0], 2, f"kill@loss rank=1 step=3; {slow}")
    check_killed(tmp_path / "pretrain", ended, 3, "data|step")
    check_slowest(tmp_path / "pretrain")
    ended = run_with_fault(
        killed[1], 2, f"kill@update rank=1 step=3; slow@rollout seconds={SLOW_S}"
    )
    check_killed(tmp_path / "ppo", ended, 3, "rollout|score|update")
    assert [newest_step(tmp_path / name) for name in ("pretrain", "ppo")] == [2, 2]

    again = run_with_fault(killed[0], 2, "")  # the same command
    assert again.code == 0, again.output
    assert [life["first_step"] for life in read_lives(tmp_path / "pretrain")] == [0, 2]
    done = run_scenarios([{"config": values} for values in (*whole, killed[1])], 2, tmp_path)
    assert done.returncode == 0, done.stdout
    for name in ("pretrain", "ppo"):
        left, right = tmp_path / name, tmp_path / f"{name}_whole"
        assert largest_difference(read_masters(left), read_masters(right)) == 0.0
    assert read_losses(tmp_path / "pretrain") == read_losses(tmp_path / "pretrain_whole")
