"""Row 13: a rank that was given up for lost comes back and goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from cluster import Cluster
from cluster_runs import Runs, identify_files, wait_until

from trainer.lives import newest_step, read_lives


@pytest.mark.faults(row=13)
@pytest.mark.slurm
@pytest.mark.slow
def test_a_rank_that_comes_back_is_stopped_by_its_token(
    runs: Runs, cluster: Cluster, tmp_path: Path
) -> None:
    """Alone it lacks no other rank, and what it writes is new: its number alone can stop it."""
    if cluster.variant == "simple":
        pytest.skip("a node without a network of its own cannot be cut off")
    run_dir = tmp_path / "run"
    values = runs.values(run_dir, nodes=1, timeout_s=3600)
    values["loop"] |= {"log_every": 100}  # so that its first word would be a checkpoint
    job = runs.submit(values, from_step=5, step_s=1.0)
    wait_until(lambda: newest_step(run_dir) >= 5, "step 5")
    [[lost, (rank, *_)]] = runs.ranks(run_dir).items()
    os.kill(rank, signal.SIGSTOP)
    cluster.cut(lost)
    try:
        cluster.wait_for_restart(job)
        cluster.wait(job, "COMPLETED")
        before = identify_files(run_dir / "checkpoints")
        journal = (run_dir / "metrics.jsonl").read_bytes()
        lives = read_lives(run_dir)
        assert [life["token"] for life in lives] == [1, 2] and lives[1]["exit_code"] == 0
        os.kill(rank, signal.SIGCONT)
        wait_until(lambda: not runs.ranks(run_dir), "the old rank to end")
    finally:
        cluster.restore(lost)
    said = (run_dir / "logs" / "rank_00000.log").read_text()
    refusal = f"kuroshio: run_dir={run_dir} belongs to life 2 (Slurm job {job}"
    assert refusal in said and "this is life 1, which was given up for lost" in said
    assert "FileNotFoundError" not in said and "Traceback" not in said
    assert identify_files(run_dir / "checkpoints") == before
    assert (run_dir / "metrics.jsonl").read_bytes() == journal
    assert read_lives(run_dir) == lives
