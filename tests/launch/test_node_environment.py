"""Interface, caches and cores of a node."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.node_environment import (
    cache_variables,
    core_warnings,
    network_variables,
    node_name,
    prepare_node,
)
from launch.rendezvous import Rendezvous
from trainer.config import ClusterConfig
from trainer.config.schema import SiteConfig

PLACE = Rendezvous(0, 4, 0, 2, "n1", 1234, "slurm")


@pytest.fixture
def interfaces(tmp_path: Path) -> Path:
    (tmp_path / "net/ib0").mkdir(parents=True)
    (tmp_path / "net/lo").mkdir()
    return tmp_path / "net"


def cluster(nodes: int = 2, **site: str) -> ClusterConfig:
    return ClusterConfig(nodes=nodes, gpus_per_node=2, site=SiteConfig(**site))


def test_the_profiles_interface_is_used_where_it_is(
    interfaces: Path, caplog: pytest.LogCaptureFixture
) -> None:
    both = {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "ib0"}
    assert network_variables(cluster(interface="ib0"), interfaces) == both
    assert network_variables(cluster(nodes=1, interface="ib0"), interfaces) == {}
    assert network_variables(cluster(), interfaces) == {} and not caplog.text
    assert network_variables(cluster(interface="ib7"), interfaces) == {}
    assert "cluster.site.interface=ib7 is not on this node, which has ib0, lo" in caplog.text


@pytest.mark.faults(row=23)
def test_caches_are_the_jobs_own_on_the_nodes_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISK", "/nvme")
    found = cache_variables(cluster(local_scratch="$DISK/tmp"), {"SLURM_JOB_ID": "17"})
    assert found == {
        "TRITON_CACHE_DIR": "/nvme/tmp/kuroshio-17/triton",
        "TORCH_EXTENSIONS_DIR": "/nvme/tmp/kuroshio-17/torch_extensions",
    }
    assert cache_variables(cluster(), {"SLURM_JOB_ID": "17"}) == {}


def test_what_the_user_set_stays(interfaces: Path) -> None:
    environ = {"GLOO_SOCKET_IFNAME": "eth0", "TRITON_CACHE_DIR": "/mine", "SLURM_JOB_ID": "17"}
    prepare_node(cluster(interface="ib0", local_scratch="/nvme"), PLACE, environ, interfaces)
    assert environ["GLOO_SOCKET_IFNAME"] == "eth0" and environ["TRITON_CACHE_DIR"] == "/mine"
    assert environ["NCCL_SOCKET_IFNAME"] == "ib0"
    assert environ["TORCH_EXTENSIONS_DIR"] == "/nvme/kuroshio-17/torch_extensions"


@pytest.mark.parametrize(
    ("asked", "cores", "warned"), [("4", 1, True), ("4", 4, False), ("", 1, False)]
)
def test_a_rank_with_too_few_cores_is_told_why(asked: str, cores: int, warned: bool) -> None:
    found = core_warnings({"SLURM_CPUS_PER_TASK": asked}, cores)
    assert bool(found) is warned
    if warned:
        assert "may use 1 of the 4 cores" in found[0] and "SRUN_CPUS_PER_TASK" in found[0]


def test_slurms_name_of_the_node_counts_before_the_hosts() -> None:
    assert node_name({"SLURMD_NODENAME": "n3"}) == "n3" and node_name({})
