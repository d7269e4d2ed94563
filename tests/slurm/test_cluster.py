"""The cluster itself: it runs jobs like Taiwania 2, loses nodes, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster, missing, running
from cluster_nodes import ClusterError, all_processes, call, can_make_machines, command_line
from cluster_runs import wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
HERE = Path(__file__).resolve().parent
ACCOUNT = "--account=MST109001"


def traces(cluster: Cluster) -> list[str]:
    """Return what is left of a cluster on this host; others may come and go meanwhile."""
    folder = str(cluster.folder)
    lines = call("ip", "-oneline", "link").splitlines()
    lines += Path("/etc/hosts").read_text().splitlines()
    found = [
        line for line in lines if f"k{cluster.tag}" in line or f"cluster {cluster.tag}" in line
    ]
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if folder in line]
    found += [command_line(pid) for pid in all_processes() if folder in command_line(pid)]
    return found + [str(path) for path in (cluster.folder, Path("/run/netns")) if path.exists()]


@pytest.mark.parametrize("variant", ["namespaces", "simple"])
def test_a_cluster_leaves_nothing(tmp_path: Path, variant: str) -> None:
    if reason := missing():
        pytest.skip(reason)
    if variant == "namespaces" and not can_make_machines():
        pytest.skip("namespaces are not allowed here")
    script = "#!/bin/bash\nsetsid sleep 999 &\nsrun bash -c 'echo here; sleep 999'\n"
    out = tmp_path / "out"
    with running(tmp_path / "cluster", num_nodes=2, variant=variant) as cluster:
        job = cluster.submit(script, "--nodes=2", ACCOUNT, "--gres=gpu:1", f"--output={out}")
        cluster.wait(job, "RUNNING")
        wait_until(lambda: out.exists() and out.read_text().count("here") == 2, "both tasks", 60)
        assert len(traces(cluster)) > 4
        left = cluster.processes()
        assert sum("sleep 999" in command_line(pid) for pid in left) >= 3
    assert traces(cluster) == []
    assert not set(left) & set(all_processes())


def test_a_cluster_ends_with_the_tests_that_use_it(tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path / "cluster"
    script = f"""
import os, signal
from pathlib import Path
from cluster import running
with running(Path({str(folder)!r}), num_nodes=1) as cluster:
    print(*cluster.processes(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    started = {int(pid) for pid in done.stdout.split()}
    assert len(started) > 3
    deadline = time.monotonic() + 30
    while folder.exists() or started & set(all_processes()):
        assert time.monotonic() < deadline, "the cluster lives on"
        time.sleep(0.1)


def test_nodes_have_names_addresses_gpus_and_disks_of_their_own(
    cluster: Cluster, tmp_path: Path
) -> None:
    if cluster.variant == "simple":
        pytest.skip("nodes without namespaces share all of this")
    script = f"""#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=2 --gres=gpu:2 {ACCOUNT} --output={tmp_path}/out
#SBATCH --error={tmp_path}/err
srun bash -c 'echo $(hostname) $(hostname -I) $CUDA_VISIBLE_DEVICES'
srun bash -c 'touch {cluster.scratch}/$(hostname)'
srun ls {cluster.scratch}
"""
    cluster.wait(cluster.submit(script), "COMPLETED")
    lines = (tmp_path / "out").read_text().splitlines()
    said, files = lines[:4], lines[4:]
    nodes = sorted({line.split()[0] for line in said})
    assert len(nodes) == 2 and len({line.split()[1] for line in said}) == 2
    assert {line.split()[2] for line in said} == {"0,1"}
    assert sorted(files) == sorted(nodes * 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gres=gpu:1"], "Account required"),
        ([ACCOUNT], "Every job needs a GPU"),
        ([ACCOUNT, "--gres=gpu:1", "--cpus-per-task=5"], "at most 4 for each"),
        ([ACCOUNT, "--gres=gpu:1", "--mem=100G"], "at most 90 GB"),
        ([ACCOUNT, "--gres=gpu:1", "--partition=express"], "not for projects of MST"),
        ([ACCOUNT, "--gres=gpu:1", "--time=31"], "time limit is invalid"),
        ([ACCOUNT, "--gres=gpu:1", "--nodes=5"], "Node count"),
    ],
)
def test_jobs_that_the_site_does_not_allow_are_refused(
    cluster: Cluster, options: list[str], said: str
) -> None:
    with pytest.raises(ClusterError, match=said):
        cluster.submit("#!/bin/bash\n", *options)


def test_the_example_of_the_command_line(tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    script = str(HERE / "cluster.py")
    folder = str(tmp_path / "cluster")
    said = call(sys.executable, script, "up", folder, "--nodes", "1")
    try:
        environ = {"SLURM_CONF": said.strip().partition("=")[2]}
        sinfo = ["sinfo", "-h", "-N", "-o", "%N %T"]
        states = call("env", *(f"{k}={v}" for k, v in environ.items()), *sinfo)
        assert set(states.splitlines()) == {"n1 idle"}
        if can_make_machines():
            assert call(sys.executable, script, "run", folder, "n1", "hostname").split() == ["n1"]
    finally:
        call(sys.executable, script, "down", folder)
    assert not Path(folder).exists()
