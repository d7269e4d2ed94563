"""Row 8: a rank that is stopped or hangs is named, and the run ends."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulty_runs import Ended, make_ppo, run_with_fault
from training_fixtures import varying

from launch.rank_log import rank_log
from trainer.errors import LostRankError
from trainer.lives import read_lives
from trainer.watchdog import Post

pytestmark = [pytest.mark.slow, pytest.mark.faults(row=8)]

TIMEOUT_S = 15  # of collectives
LEAVE_S = 20.0  # to look twice, to leave, to kill a stopped rank; this machine may be busy
HOST = socket.gethostname()
Vary = Callable[..., dict[str, Any]]


def check_end(run_dir: Path, ended: Ended, named: str, done: str) -> None:
    """Check that a run ended in time, and that message and record name who hangs where."""
    assert ended.code == LostRankError.exit_code, ended.output
    assert ended.still_s < Post(run_dir, 1, 0, 2, TIMEOUT_S).limit_s + LEAVE_S
    [life] = read_lives(run_dir)
    said = [line for line in ended.output.splitlines() if "no progress for" in line]
    assert len(said) == 1, ended.output
    for text in (said[0], life["reason"]):
        assert f"{named} on {HOST}" in text and done in text
    assert life["exit_code"] == LostRankError.exit_code


def test_a_stopped_rank_is_named(vary: Vary, tmp_path: Path) -> None:
    values = vary(tmp_path / "run", loop__global_batch_tokens=96 * 6)
    fault = "stop@step rank=1 step=2; slow@data seconds=1.5"
    ended = run_with_fault(values, 3, fault, timeout_s=TIMEOUT_S)
    check_end(tmp_path / "run", ended, "rank 1", "step 1")
    assert (
        "is silent for" in ended.output and "2 ranks wait for others after step 2" in ended.output
    )
    for rank in (0, 2):
        stacks = rank_log(tmp_path / "run", rank).read_text()
        assert "most recent call first" in stacks and "sum_over_ranks" in stacks


@pytest.mark.parametrize(
    ("stage", "point", "phase"),
    [("sft", "loss", "step"), ("dpo", "data", "data"), ("ppo", "rollout", "rollout")],
)
def test_a_hanging_rank_is_named(
    stage: str,
    point: str,
    phase: str,
    chat_config: dict[str, Any],
    dpo_config: dict[str, Any],
    tmp_path: Path,
) -> None:
    bases = {"sft": chat_config, "dpo": dpo_config}
    base = bases[stage] if stage in bases else make_ppo(dpo_config)
    ended = run_with_fault(
        varying(base)(tmp_path / "run"), 2, f"hang@{point} rank=1 step=2", timeout_s=TIMEOUT_S
    )
    check_end(tmp_path / "run", ended, "rank 1", f"(step 2, phase {phase})")
    assert "hangs in reach (trainer/faults.py:" in ended.output
    assert "1 rank waits for others after step 2" in ended.output
    stacks = rank_log(tmp_path / "run", 1).read_text()
    assert "most recent call first" in stacks and "in train_step" in stacks
