"""The files of a cluster: folders, configuration of the daemons, names of the nodes."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster_nodes import call

from launch.rendezvous import free_port

if TYPE_CHECKING:
    from cluster import Cluster

HERE = Path(__file__).resolve().parent
NODE_PORT = 26818


def make_folders(cluster: Cluster) -> None:
    own = [f"{part}/{node}" for part in ("spool", "disk") for node in cluster.nodes]
    for name in ("run", "log", "state", "munge", "dev", "scratch", *own):
        (cluster.folder / name).mkdir(parents=True)
    for number in range(cluster.gpus_per_node):
        path = cluster.folder / "dev" / f"nvidia{number}"
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    key = cluster.folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)


def write_config(cluster: Cluster) -> None:
    folder, host = cluster.folder, socket.gethostname().partition(".")[0]
    simple = cluster.variant == "simple"
    plugin = any(Path("/usr/lib").glob("**/slurm*/job_submit_lua.so"))
    template = (HERE / "slurm.conf.template").read_text()
    addresses = f"NodeAddr={cluster.network}.[11-{10 + cluster.num_nodes}]"
    text = template.format(
        name=f"k{cluster.tag}",
        host=host,
        controller_address="127.0.0.1" if simple else f"{cluster.network}.1",
        controller_port=free_port(),
        node_port=NODE_PORT,
        folder=folder,
        job_submit="JobSubmitPlugins=lua" if plugin else "",
        num_nodes=cluster.num_nodes,
        addresses="" if simple else addresses,
        gpus_per_node=cluster.gpus_per_node,
    )
    if simple:
        text = _list_nodes(text, cluster.nodes, f"NodeHostname={host} NodeAddr=127.0.0.1")
    devices = f"{folder}/dev/nvidia[0-{cluster.gpus_per_node - 1}]"
    nodes = f"n[1-{cluster.num_nodes}]"
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text(f"NodeName={nodes} Name=gpu File={devices}\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "mpi.conf").write_text(f"PMIxCliTmpDirBase={cluster.scratch}\n")
    shutil.copy(HERE / "job_submit.lua", folder)


def _list_nodes(text: str, nodes: Sequence[str], where: str) -> str:
    """Give every node a line and a port of its own, as they share one address."""
    [line] = re.findall(r"^NodeName=.*$", text, re.MULTILINE)
    facts = line.split(maxsplit=1)[1]
    lines = [f"NodeName={node} {where} Port={free_port()} {facts}" for node in nodes]
    return text.replace(line, "\n".join(lines))


def free_network(tag: str) -> str:
    """Return the first three numbers of a network that this host does not use."""
    used = call("ip", "-o", "address")
    first = int(tag, 16)
    candidates = (f"10.{100 + n // 256 % 100}.{n % 256}" for n in range(first, first + 25600))
    return next(network for network in candidates if f" {network}." not in used)


def name_nodes(cluster: Cluster) -> None:
    """Let this host know the nodes' names; without mounts, only its own table can."""
    with Path("/etc/hosts").open("a") as hosts:
        hosts.write(f"127.0.0.1 {' '.join(cluster.nodes)} {_mark(cluster)}\n")


def unname_nodes(cluster: Cluster) -> None:
    hosts = Path("/etc/hosts")
    lines = hosts.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.endswith(f"{_mark(cluster)}\n")]
    if kept != lines:
        hosts.write_text("".join(kept))


def _mark(cluster: Cluster) -> str:
    return f"# cluster {cluster.tag}"
