"""``kuroshio doctor`` on a real cluster: it names the slow node, the cut node and the cut link."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300
WORDS = (
    "cluster=local_slurm", "cluster.account=MST109001", "cluster.gpus_per_node=1",
    'cluster.site.gres="gpu:{n}"', "cluster.site.interface=ib0",
)  # fmt: skip

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def doctor(cluster: Cluster, folder: Path, *words: str) -> dict[str, Any]:
    """Run the verb on the login node; return what it printed."""
    command = [sys.executable, "-m", "launch", "doctor", "--json", "--timeout", "20", *WORDS]
    done = subprocess.run(
        [*command, f"run_dir={folder}/run", *words],
        cwd=ROOT, env=cluster.environ, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == found["exit_code"]
    return found


@pytest.fixture(autouse=True)
def _nodes_with_cables(cluster: Cluster) -> None:
    if cluster.variant == "simple":
        pytest.skip("nodes without namespaces have no network of their own")


def said(found: dict[str, Any], words: str) -> dict[str, Any]:
    """Return the one finding whose text has ``words``."""
    (finding,) = [f for f in found["findings"] if words in f"{f['what']} {f['why']}"]
    return dict(finding)


@contextmanager
def unplugged(cluster: Cluster, node: str) -> Iterator[None]:
    cluster.cut(node)
    try:
        yield
    finally:
        cluster.restore(node)


@contextmanager
def apart(cluster: Cluster, first: str, second: str) -> Iterator[None]:
    """Cut the link between two nodes, and no other."""
    address = cluster.machines[second].call("hostname", "-I").split()[0]
    route = ("ip", "route", "{}", "blackhole", f"{address}/32")
    cluster.machines[first].call(*(word.format("add") for word in route))
    try:
        yield
    finally:
        cluster.machines[first].call(*(word.format("del") for word in route))


@contextmanager
def throttled(cluster: Cluster, node: str) -> Iterator[None]:
    """Let a node receive 50 Mbit/s."""
    qdisc = ("tc", "qdisc", "{}", "dev", node, "root")
    limit = ("tbf", "rate", "50mbit", "burst", "256kb", "latency", "50ms")
    switch = cluster.machines["switch"]
    switch.call(*(word.format("add") for word in qdisc), *limit)
    try:
        yield
    finally:
        switch.call(*(word.format("del") for word in qdisc))


def test_login_node(cluster: Cluster, tmp_path: Path) -> None:
    found = doctor(cluster, tmp_path, "cluster.partition=gp1d", "cluster.nodes=9")
    assert said(found, "partition gp1d: time limit 1-00:00:00")["level"] == "ok"
    assert said(found, "cluster.nodes=9")["remedy"].startswith("cluster.nodes=4")
    assert found["exit_code"] == 78
    assert "pmix" in said(found, "srun --mpi has")["what"]
    assert list(tmp_path.iterdir()) == []


def test_slow_node_is_named(cluster: Cluster, tmp_path: Path) -> None:
    with throttled(cluster, "n3"):
        found = doctor(cluster, tmp_path, "--nodes", "4")
    assert "4 ranks on 4 nodes reported" in json.dumps(found)
    shares = {
        finding["nodes"][0]: int(re.findall(r"(\d+)%", finding["what"])[0])
        for finding in found["findings"]
        if "its best link" in finding["what"]
    }
    # Four nodes on the cores of one machine disturb each other, but not by so much.
    assert shares["n3"] < 20 and all(share > 20 for node, share in shares.items() if node != "n3")
    assert "n3" in found["exclude"] and found["exit_code"] == 78


def test_cut_node_and_cut_link_are_named(cluster: Cluster, tmp_path: Path) -> None:
    with unplugged(cluster, "n2"), apart(cluster, "n3", "n4"):
        found = doctor(cluster, tmp_path, "--nodes", "4")
    silent = said(found, "n2: nothing within 20 s")
    assert silent["nodes"] == ["n2"] and "Task launch" in silent["why"]
    assert said(found, "n3 - n4: no gloo all-reduce")["nodes"] == ["n4"]
    assert {"n2", "n4"} <= set(found["exclude"]) and found["exit_code"] == 78
    assert cluster.call("squeue", "-h") == ""


def test_first_node_cut_is_named(cluster: Cluster, tmp_path: Path) -> None:
    with unplugged(cluster, "n1"):
        found = doctor(cluster, tmp_path, "--nodes", "4")
    assert found["exclude"] == ["n1"]
    assert said(found, "n1: it should have run the job's script")["level"] == "error"


def test_inside_an_allocation(cluster: Cluster, tmp_path: Path) -> None:
    """Two ranks on each of two nodes, every folder and the clocks compared."""
    words = [
        *WORDS, "cluster.gpus_per_node=2", f"cluster.site.local_scratch={cluster.scratch}",
        f"run_dir={tmp_path}/run", "--nodes", "2", "--timeout", "60", "--json",
    ]  # fmt: skip
    line = " ".join(f"'{word}'" for word in (sys.executable, "-m", "launch", "doctor", *words))
    script = f"""#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=2 --gres=gpu:2 --account=MST109001 --output={tmp_path}/out
cd {ROOT} && {line} >{tmp_path}/found.json
"""
    cluster.wait(cluster.submit(script), "COMPLETED", "FAILED")
    found = json.loads((tmp_path / "found.json").read_text())
    assert said(found, "4 ranks on 2 nodes reported")["level"] == "ok"
    assert said(found, "all nodes see")["level"] == "ok"
    assert said(found, "clocks differ by")["level"] == "ok"
    assert said(found, "node-local scratch: ")["level"] == "ok"
    assert said(found, "gloo between nodes, 1 pairs")["level"] == "ok"
