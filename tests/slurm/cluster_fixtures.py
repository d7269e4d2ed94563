"""The cluster that all tests of a process share, and runs on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, missing, running
from cluster_runs import Runs


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Hold a cluster of four nodes with two GPUs each, n1 to n4, for all tests of this process."""
    if reason := missing():
        pytest.skip(reason)
    with running(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Cancel what a test left, so that the next one finds all nodes."""
    if found := cluster_of(item):
        found.empty()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show the daemons' logs beside a failure."""
    report = yield
    if report.when == "call" and report.failed and (found := cluster_of(item)):
        report.sections.append(("Slurm's logs", found.logs()))
    return report


def cluster_of(item: pytest.Item) -> Cluster | None:
    """Return the cluster that a test uses, if it uses one; "cluster" may be other things, too."""
    found = getattr(item, "funcargs", {}).get("cluster")
    return found if isinstance(found, Cluster) else None


@pytest.fixture(scope="session")
def runs(cluster: Cluster, base_config: dict[str, Any]) -> Runs:
    """Return what submits runs of a micro model."""
    return Runs(cluster, base_config)


@pytest.fixture(scope="session")
def unbroken(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run on two nodes under ZeRO-2 that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    runs.cluster.wait(runs.submit(runs.values(run_dir)), "COMPLETED")
    return run_dir
