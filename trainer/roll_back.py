"""Going back to a checkpoint and on with other data, in the same way in this life and the next.

A run rolls back by writing a line to ``RUN/roll_backs.jsonl`` and then starting from its newest
checkpoint like any resumed life. The line says from which row of the data on: behind the step that
failed, as PaLM's training skipped the batches around a spike (arXiv:2204.02311, section 5.1). So
a run that is killed in between resumes in the same way, and later checkpoints hold the new place.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.engine.collectives import broadcast_int
from trainer.engine.committed import Checkpoint
from trainer.errors import NumericsError, RollBackError
from trainer.lives import utc_now

ROLL_BACKS_NAME = "roll_backs.jsonl"


@dataclass(frozen=True)
class RollBack:
    """One roll-back of a run.

    Attributes:
        time: ISO 8601, UTC.
        failed_step: the step that must not be, from 1.
        to_step: steps done in the checkpoint.
        next_row: row of the data that comes next.
        reason: the guard's message.
    """

    time: str
    failed_step: int
    to_step: int
    next_row: int
    reason: str

    def describe(self) -> dict[str, Any]:
        """Return what an event of it says."""
        fields = asdict(self)
        return {key: fields[key] for key in ("failed_step", "next_row", "reason")}


def read_roll_backs(run_dir: Path) -> list[RollBack]:
    """Return the roll-backs of a run, oldest first; a torn line was never acted on."""
    path, found = run_dir / ROLL_BACKS_NAME, []
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else ():
        try:
            found.append(RollBack(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def redirect(checkpoint: Checkpoint | None, run_dir: Path, rank: int) -> Checkpoint | None:
    """Return a checkpoint with the data that the roll-backs to it chose; all ranks call this.

    Rank 0's view of the file counts. A checkpoint saved after a roll-back knows of it.
    """
    if checkpoint is None:
        return None
    made = read_roll_backs(run_dir) if rank == 0 else []
    guard = checkpoint.state.get("guard", {})
    own = [one for one in made[guard.get("num_roll_backs", 0) :] if one.to_step == checkpoint.step]
    next_row = broadcast_int(own[-1].next_row if own else -1)
    if next_row < 0:
        return checkpoint
    loader = {**checkpoint.state["loader"], "next_row": next_row}
    guard = {**guard, "num_roll_backs": broadcast_int(len(made))}
    state = {**checkpoint.state, "loader": loader, "guard": guard}
    return dataclasses.replace(checkpoint, manifest={**checkpoint.manifest, "state": state})


def record_roll_back(
    error: RollBackError,
    checkpoint: Checkpoint | None,
    run_dir: Path,
    rank: int,
    rows_per_step: int,
    max_roll_backs: int,
) -> RollBack:
    """Write on rank 0 that the run goes back to ``checkpoint``, redirected; all ranks call this.

    Raises:
        NumericsError: there is no checkpoint, or the run has gone back often enough.
    """
    num = broadcast_int(len(read_roll_backs(run_dir)) if rank == 0 else 0)
    if checkpoint is None:
        raise NumericsError(f"{error} (no checkpoint to roll back to yet)") from error
    if num >= max_roll_backs:
        raise NumericsError(
            f"{error} (guard.max_roll_backs={max_roll_backs} are used up)"
        ) from error
    num_steps = error.step + 1 - checkpoint.step
    next_row = checkpoint.state["loader"]["next_row"] + num_steps * rows_per_step
    made = RollBack(utc_now(), error.step + 1, checkpoint.step, next_row, str(error))
    if rank == 0:
        _append(run_dir / ROLL_BACKS_NAME, json.dumps(asdict(made), ensure_ascii=False))
    return made


def _append(path: Path, line: str) -> None:
    """Append a line durably, behind one that a kill may have torn."""
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        torn = size and file.read(1) != b"\n"
        file.write((b"\n" if torn else b"") + line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
