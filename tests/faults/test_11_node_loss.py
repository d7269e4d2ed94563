"""Row 11: a node is lost and no other one is left to take its place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster
from cluster_runs import Runs, wait_until
from probe_runs import ROOT
from training_support import read_losses

from trainer.lives import read_lives


def kuroshio(cluster: Cluster, *words: str) -> str:
    """Return what a command prints."""
    done = subprocess.run(
        [sys.executable, "-m", "launch", *words],
        env=cluster.environ, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.faults(row=11)
@pytest.mark.slurm
@pytest.mark.slow
def test_with_too_few_nodes_left_a_run_waits_and_says_so_and_goes_on_with_fewer(
    runs: Runs, cluster: Cluster, unbroken: Path, tmp_path: Path
) -> None:
    if cluster.variant == "simple":
        pytest.skip("a node without a network of its own cannot be cut off")
    cluster.wait_until_idle()
    run_dir = tmp_path / "run"
    values = runs.values(run_dir, nodes=4)
    job = runs.submit_until(7, values, from_step=7, step_s=1.0)
    [lost, *_] = set(cluster.nodes) - {cluster.show(job)["BatchHost"]}
    cluster.cut(lost)
    try:
        cluster.wait(job, "PENDING")
        wait_until(lambda: waits_for_nodes(cluster, job), "the job to find too few nodes")
        said = kuroshio(cluster, "watch", str(run_dir), "--once")
        assert "requeued" in said or "pending" in said, said
        assert "nodes" in said.lower() and "down" in said.lower(), said
        cluster.cancel(job)
        values["cluster"]["nodes"] = 2
        cluster.wait(runs.submit(values), "COMPLETED")
    finally:
        cluster.restore(lost)
    first, *_, last = read_lives(run_dir)
    assert (first["world_size"], last["world_size"]) == (4, 2)
    assert first["first_step"] == 0 and last["first_step"] == 5
    losses, expected = read_losses(run_dir), read_losses(unbroken)
    assert losses.keys() == expected.keys()
    assert max(abs(losses[step] - expected[step]) for step in losses) < 1e-4


def waits_for_nodes(cluster: Cluster, job: str) -> bool:
    """Return whether a job waits for nodes, no longer for its old credential."""
    shown = cluster.show(job)
    cluster.hurry(shown)
    return shown["Reason"] not in ("BeginTime", "None", "Priority")
