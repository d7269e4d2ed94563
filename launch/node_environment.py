"""What the cluster's profile says of a node, as the libraries' environment variables."""

from __future__ import annotations

import getpass
import logging
import os
import socket
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from launch.rendezvous import Rendezvous
from trainer.config import ClusterConfig

LOG = logging.getLogger(__name__)
INTERFACES = Path("/sys/class/net")
CACHES = {"TRITON_CACHE_DIR": "triton", "TORCH_EXTENSIONS_DIR": "torch_extensions"}


def prepare_node(
    cluster: ClusterConfig,
    found: Rendezvous,
    environ: MutableMapping[str, str],
    interfaces: Path = INTERFACES,
) -> None:
    """Set interface and caches for this rank, before the libraries read them; what is set stays."""
    for key, value in network_variables(cluster, interfaces).items():
        environ.setdefault(key, value)
    for key, value in cache_variables(cluster, environ).items():
        environ.setdefault(key, value)
    if found.local_rank == 0:
        for warning in core_warnings(environ, len(os.sched_getaffinity(0))):
            LOG.warning("%s: %s", node_name(environ), warning)


def node_name(environ: Mapping[str, str]) -> str:
    """Return the node's name: Slurm's, since several nodes of a test share one host name."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def network_variables(cluster: ClusterConfig, interfaces: Path) -> dict[str, str]:
    """Return which network interface ranks of several nodes use, if the profile names one.

    On one node there is nothing to choose, and an interface may be down without harm.
    """
    name = cluster.site.interface
    if name is None or cluster.nodes == 1:
        return {}
    if not (interfaces / name).exists():
        there = ", ".join(sorted(path.name for path in interfaces.iterdir()))
        LOG.warning("cluster.site.interface=%s is not on this node, which has %s", name, there)
        return {}
    return {"NCCL_SOCKET_IFNAME": name, "GLOO_SOCKET_IFNAME": name}


def cache_variables(cluster: ClusterConfig, environ: Mapping[str, str]) -> dict[str, str]:
    """Return folders of this job on the node's own disk for what is compiled at run time.

    On a shared file system Triton's cache hangs (DeepSpeed #5205), and the lock of torch's
    extensions outlives its holder.
    """
    if cluster.site.local_scratch is None:
        return {}
    scratch = os.path.expandvars(cluster.site.local_scratch)
    owner = environ.get("SLURM_JOB_ID") or getpass.getuser()
    folder = Path(scratch) / f"kuroshio-{owner}"
    return {key: str(folder / name) for key, name in CACHES.items()}


def core_warnings(environ: Mapping[str, str], num_cores: int) -> list[str]:
    """Return what is wrong with the CPU cores this rank was given."""
    asked = environ.get("SLURM_CPUS_PER_TASK", "")
    if not asked.isdigit() or num_cores >= int(asked):
        return []
    return [
        f"this rank may use {num_cores} of the {asked} cores that the job asked for a task; since "
        "Slurm 22.05 srun needs SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK exported before it"
    ]
