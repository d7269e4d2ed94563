"""Disturb the ranks of a run as ``brake.json`` beside this file says; for tests only.

starts, attempts: how often Slurm starts the job, and its script the ranks, until nothing is
    disturbed any more; 1 unless given
from_step, step_s: each step from this one on takes so many seconds longer
hold_save: rank 0 waits in the save of this step until ``RUN/release`` exists
kill_at, nan_at: rank 1 dies by SIGKILL, or every rank finds NaN, in this step
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def disturb(plan: dict) -> None:
    """Put the disturbances before the steps and saves of this rank."""
    from trainer import loop
    from trainer.engine import checkpoint
    from trainer.errors import NumericsError

    rank, train_step = os.environ["SLURM_PROCID"], loop.TrainStage.train_step
    run_dir = Path(__file__).resolve().parents[1]

    def braked_step(self, step, batches):
        if step >= plan.get("from_step", 1e9):
            time.sleep(plan["step_s"])
        if step == plan.get("kill_at") and rank == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        if step == plan.get("nan_at"):
            raise NumericsError(f"loss is NaN at step {step}")
        return train_step(self, step, batches)

    def commit_late(aside, final, manifest, lease):
        if manifest["step"] == plan.get("hold_save"):
            (run_dir / "held").touch()
            while not (run_dir / "release").exists():
                time.sleep(0.1)
            (run_dir / "released").touch()
        commit(aside, final, manifest, lease)

    commit = checkpoint._commit
    loop.TrainStage.train_step, checkpoint._commit = braked_step, commit_late


file = Path(__file__).with_name("brake.json")
if file.exists() and "run" in sys.orig_argv and "SLURM_PROCID" in os.environ:
    found = json.loads(file.read_text())
    restart, attempt = os.environ.get("SLURM_RESTART_COUNT", "0"), os.environ["KUROSHIO_ATTEMPT"]
    if int(restart) < found.get("starts", 1) and int(attempt) < found.get("attempts", 1):
        disturb(found)
