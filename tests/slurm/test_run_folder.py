"""One folder, several jobs: the second is refused, and a later one may have other nodes."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from cluster import Cluster
from cluster_runs import Runs
from training_support import largest_difference, read_losses, read_masters

from trainer.errors import EXIT_RESUME, STOP_FILE_CAUSE
from trainer.lease import read_holder
from trainer.lives import newest_step, read_lives

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def start_by_hand(cluster: Cluster, run_dir: Path, num_nodes: int) -> str:
    """Submit a script of three lines around the frozen config."""
    words = [sys.executable, str(run_dir / "code"), "run", "--config", str(run_dir / "config.yaml")]
    script = (
        f"#!/bin/bash\nexport OMP_NUM_THREADS=1\nsrun --kill-on-bad-exit=1 {shlex.join(words)}\n"
    )
    return cluster.submit(
        script, f"--nodes={num_nodes}", "--ntasks-per-node=1", "--account=MST109001",
        "--gres=gpu:1", f"--output={run_dir}/by_hand-%j.out",
    )  # fmt: skip


@pytest.mark.faults(row=21)
def test_a_folder_is_one_jobs_and_the_next_may_have_fewer_nodes(
    runs: Runs, cluster: Cluster, unbroken: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = runs.submit_until(7, runs.values(run_dir), from_step=7, step_s=2.0)

    second = start_by_hand(cluster, run_dir, 1)
    shown = cluster.wait(second, "FAILED")
    holder = read_holder(run_dir)
    assert holder is not None and (holder.job, holder.token) == (job, 1)
    said = Path(shown["StdOut"]).read_text()
    assert shown["ExitCode"] == "73:0"
    assert f"is in use: Slurm job {job} on {holder.host}" in said and f"scancel {job}" in said

    (run_dir / "stop").touch()
    shown = cluster.wait(job, "FAILED")
    assert (shown["Restarts"], shown["ExitCode"]) == ("0", f"{EXIT_RESUME}:0")
    assert not (run_dir / "stop").exists() and 7 <= newest_step(run_dir) < 16

    cluster.wait(start_by_hand(cluster, run_dir, 1), "COMPLETED")
    stopped, refused, last = read_lives(run_dir)
    assert (stopped["cause"], stopped["decision"]) == (STOP_FILE_CAUSE, "leave")
    assert refused["exit_code"] == 73 and "started" not in refused
    assert (last["world_size"], last["exit_code"]) == (1, 0)
    assert last["changes"] == {"cluster.nodes": [2, 1]}
    losses, expected = read_losses(run_dir), read_losses(unbroken)
    assert losses.keys() == expected.keys()
    assert max(abs(losses[step] - expected[step]) for step in losses) < 1e-4
    assert largest_difference(read_masters(unbroken), read_masters(run_dir)) < 1e-4
