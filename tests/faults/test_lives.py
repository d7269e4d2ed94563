"""Runs on two nodes that are stopped, preempted, killed or cut off end like an unbroken one."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from cluster_runs import Runs, identify_files, wait_until
from training_support import largest_difference, read_losses, read_masters

from trainer.engine.committed import list_steps
from trainer.lives import newest_step, read_lives

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
SLOW = {"from_step": 7, "step_s": 1.0}


def check_like(unbroken: Path, run_dir: Path) -> None:
    """Check that weights and losses of a run are, bit for bit, those of the unbroken one."""
    assert read_losses(run_dir) == read_losses(unbroken)
    assert largest_difference(read_masters(run_dir), read_masters(unbroken)) == 0.0


def reasons(run_dir: Path) -> list[tuple[Any, ...]]:
    """Return of each life its first step, exit code and what was decided then."""
    return [
        (life.get("first_step"), life.get("exit_code"), life.get("decision"))
        for life in read_lives(run_dir)
    ]


def test_a_run_on_two_nodes(unbroken: Path) -> None:
    assert newest_step(unbroken) == 16 and len(read_losses(unbroken)) == 16
    [life] = read_lives(unbroken)
    assert (life["launcher"], life["world_size"], life["exit_code"]) == ("slurm", 2, 0)
    manifest = json.loads((list_steps(unbroken / "checkpoints")[0] / "manifest.json").read_text())
    assert len([name for name in manifest["files"] if name.startswith("rank_")]) == 2


def limit_time(cluster: Cluster, job: str, minutes_left: int) -> None:
    """Set a job's time limit to so many minutes from now."""
    hours, minutes, _ = cluster.show(job)["RunTime"].split(":")
    limit = int(hours) * 60 + int(minutes) + minutes_left
    cluster.call("scontrol", "update", f"jobid={job}", f"timelimit={limit}")


@pytest.mark.faults(row=6)
def test_the_time_limit_is_survived(
    runs: Runs, cluster: Cluster, unbroken: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = runs.submit_until(7, runs.values(run_dir), from_step=7, step_s=3.0)
    limit_time(cluster, job, minutes_left=2)  # sooner than the signal is due, so it comes now
    cluster.wait(job, "PENDING")
    limit_time(cluster, job, minutes_left=30)
    cluster.wait(job, "COMPLETED")
    first, last = reasons(run_dir)
    assert first[1:] == (75, "requeue") and 7 <= last[0] < 16 and last[1:] == (0, "done")
    check_like(unbroken, run_dir)


@pytest.mark.faults(row=6)
def test_preemption_is_survived(
    runs: Runs, cluster: Cluster, unbroken: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    values = runs.values(run_dir)
    values["log"] = {"wandb": "offline"}
    job = runs.submit_until(7, values, **SLOW)
    urgent = cluster.submit(
        "#!/bin/bash\nsleep 3\n", "--account=ENT109001", "--partition=express", "--nodes=4",
        "--gres=gpu:2", "--output=/dev/null",
    )  # fmt: skip
    cluster.wait(urgent, "COMPLETED")
    shown = cluster.wait(job, "COMPLETED")
    assert shown["Restarts"] == "1"
    first, last = reasons(run_dir)
    assert first[1] == 75 and first[2] in ("requeue", "leave", None)  # Slurm may end the script
    assert last[0] >= 7 and last[1:] == (0, "done")
    check_like(unbroken, run_dir)
    check_saved_together(run_dir, step=last[0], num_ranks=2)
    check_goes_on(run_dir, Path(shown["StdOut"]))


def check_saved_together(run_dir: Path, step: int, num_ranks: int) -> None:
    """Check that the checkpoint between two lives is of one step and of all ranks."""
    [path] = [p for p in list_steps(run_dir / "checkpoints") if int(p.name[5:]) == step]
    manifest = json.loads((path / "manifest.json").read_text())
    shards = [name for name in manifest["files"] if name.startswith("rank_")]
    assert (manifest["step"], len(shards)) == (step, num_ranks)


def check_goes_on(run_dir: Path, output: Path) -> None:
    """Check that logs were appended to, and that wandb was told of one run, not of two."""
    log = (run_dir / "logs" / "rank_00000.log").read_text()
    assert log.index("step 1/16") < log.index("step 8/16") < log.index("step 16/16")
    assert "the run is finished at step 16" in output.read_text()
    records = list((run_dir / "wandb").glob("offline-run-*"))
    assert len(records) == 2 and len({path.name.rpartition("-")[2] for path in records}) == 1


def test_a_cancelled_run_saves_and_can_be_submitted_again(
    runs: Runs, cluster: Cluster, unbroken: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    values = runs.values(run_dir)
    job = runs.submit_until(7, values, **SLOW)
    cluster.cancel(job)
    assert cluster.wait(job, "CANCELLED")["Restarts"] == "0"
    wait_until(lambda: not runs.ranks(run_dir), "the ranks to end")
    assert 7 <= newest_step(run_dir) < 16
    cluster.wait(runs.submit(values), "COMPLETED")
    check_like(unbroken, run_dir)


@pytest.mark.faults(row=1)
def test_a_killed_rank_is_survived(
    runs: Runs, cluster: Cluster, unbroken: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = runs.submit_until(7, runs.values(run_dir), **SLOW)
    *_, (victim, *_) = runs.ranks(run_dir).values()
    os.kill(victim, signal.SIGKILL)
    cluster.wait(job, "COMPLETED")
    assert cluster.show(job)["Restarts"] == "0"  # the nodes were not given back
    first, last = reasons(run_dir)
    assert first[2] == "restart" and last == (5, 0, "done")
    check_like(unbroken, run_dir)


@pytest.mark.faults(row=18)
def test_a_crash_loop_ends(runs: Runs, cluster: Cluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = runs.submit(runs.values(run_dir), starts=99, attempts=99, kill_at=0)
    shown = cluster.wait(job, "FAILED")
    assert shown["Restarts"] == "1"
    assert [life[2] for life in reasons(run_dir)] == ["restart", "requeue", "give up"]
    assert "committed no checkpoint" in Path(shown["StdOut"]).read_text()


@pytest.mark.faults(row=18)
def test_what_a_retry_would_repeat_is_not_retried(
    runs: Runs, cluster: Cluster, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = runs.submit(runs.values(run_dir), starts=99, attempts=99, nan_at=2)
    shown = cluster.wait(job, "FAILED")
    assert (shown["Restarts"], shown["ExitCode"]) == ("0", "76:0")
    assert reasons(run_dir) == [(0, 76, "give up")]


@pytest.mark.faults(row=11)
@pytest.mark.faults(row=13)
def test_a_lost_node_is_replaced_and_its_ranks_cannot_write_any_more(
    runs: Runs, cluster: Cluster, unbroken: Path, tmp_path: Path
) -> None:
    if cluster.variant == "simple":
        pytest.skip("a node without a network of its own cannot be cut off")
    run_dir = tmp_path / "run"
    # Longer than the test, so that neither a collective nor the watchdog ends the old ranks.
    values = runs.values(run_dir, timeout_s=3600)
    values["loop"] |= {"save_async": False}
    job = runs.submit(values, hold_save=10)
    wait_until((run_dir / "held").exists, "rank 0 to be in its save")
    lost = cluster.show(job)["BatchHost"]
    cluster.cut(lost)
    try:
        cluster.wait_for_restart(job)
        nodes = cluster.show(job)["NodeList"]
        assert lost not in cluster.call("scontrol", "show", "hostnames", nodes).split()
        cluster.wait(job, "COMPLETED")
        check_like(unbroken, run_dir)
        first, last = read_lives(run_dir)
        assert last["first_step"] == 5 and last["token"] > first["token"]
        assert len(runs.ranks(run_dir)[lost]) == 1  # it knows nothing of all this
        before = identify_files(run_dir / "checkpoints")
        metrics = (run_dir / "metrics.jsonl").read_text()
        (run_dir / "release").touch()
        wait_until((run_dir / "released").exists, "the old rank 0 to go on with its save")
    finally:
        cluster.restore(lost)
    wait_until(lambda: not runs.ranks(run_dir), "the old rank 0 to end")
    assert identify_files(run_dir / "checkpoints") == before
    assert (run_dir / "metrics.jsonl").read_text() == metrics
    assert len(read_lives(run_dir)) == 2 and read_lives(run_dir)[1] == last
