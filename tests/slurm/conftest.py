"""The cluster that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster import Cluster, down, missing, up


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Hold a cluster of four nodes with two GPUs each, n1 to n4, for all tests of this process."""
    if reason := missing():
        pytest.skip(reason)
    cluster = up(tmp_path_factory.mktemp("slurm") / "cluster")
    yield cluster
    down(cluster)


@pytest.fixture(autouse=True)
def _leave_the_cluster_idle(request: pytest.FixtureRequest) -> Iterator[None]:
    """Cancel what a test left, so that the next one finds all nodes."""
    yield
    if "cluster" in request.fixturenames:
        cluster: Cluster = request.getfixturevalue("cluster")
        cluster.empty()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show the daemons' logs beside a failure."""
    report = yield
    if report.when == "call" and report.failed and "cluster" in getattr(item, "funcargs", {}):
        report.sections.append(("Slurm's logs", item.funcargs["cluster"].logs()))
    return report
