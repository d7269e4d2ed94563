"""A Slurm cluster of several nodes on this machine, all in one folder and gone without a trace.

``python tests/slurm/cluster.py up FOLDER`` starts one, ``down FOLDER`` ends it and removes the
folder, ``run FOLDER n1 COMMAND…`` runs a command on a node, ``cut FOLDER n2`` unplugs a node and
``restore FOLDER n2`` plugs it in again. Several clusters do not disturb each other.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cluster_files import free_network, make_folders, name_nodes, unname_nodes, write_config
from cluster_jobs import Jobs
from cluster_nodes import (
    ClusterError,
    Machine,
    all_processes,
    can_make_machines,
    command_name,
    connect,
    end_processes,
    is_alive,
    namespace_of,
    plug_in_host,
    start,
    start_machine,
    start_switch,
)

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "nsenter")
INSTALL = "apt-get install slurmctld slurmd slurm-client munge iproute2 util-linux"
RECORD = "cluster.json"
START_TIMEOUT_S = 60


@dataclass
class Cluster(Jobs):
    """A running cluster: everything it needs to be used and to be ended."""

    folder: Path
    variant: str
    num_nodes: int
    gpus_per_node: int
    network: str = ""
    daemons: dict[str, int] = field(default_factory=dict)
    machines: dict[str, Machine] = field(default_factory=dict)

    @property
    def nodes(self) -> list[str]:
        return [f"n{number + 1}" for number in range(self.num_nodes)]

    @property
    def tag(self) -> str:
        """Return a short name of this cluster on this host."""
        return hashlib.sha256(str(self.folder).encode()).hexdigest()[:6]

    @property
    def scratch(self) -> Path:
        """Return the folder that is a disk of its own on every node (in namespaces)."""
        return self.folder / "scratch"

    def cut(self, node: str) -> None:
        """Unplug a node's network cable; its processes live on."""
        self.machines["switch"].call("ip", "link", "set", node, "down")

    def plug_in(self, node: str) -> None:
        """Plug a node's network cable in again."""
        self.machines["switch"].call("ip", "link", "set", node, "up")

    def restore(self, node: str) -> None:
        """Plug a node's network cable in again and wait until Slurm uses it."""
        self.plug_in(node)
        self.wait_until_idle(node)

    def wait_until_idle(self, *nodes: str, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until nodes (default: all) are up and no job holds them."""
        deadline = time.monotonic() + timeout_s
        wanted = ",".join(nodes or self.nodes)
        while set(states := self.call("sinfo", "-h", "-N", "-o", "%T", "-n", wanted).split()) != {
            "idle"
        }:
            if time.monotonic() > deadline:
                raise ClusterError(f"{wanted} never became idle but {states}\n{self.logs()}")
            time.sleep(0.1)

    def processes(self) -> list[int]:
        """Return every living process of this cluster: daemons, steps and whatever jobs left."""
        found = [pid for pid in self.daemons.values() if is_alive(pid)]
        if self.machines:
            spaces = {namespace_of(m.holder) for m in self.machines.values()} - {""}
            return found + [pid for pid in all_processes() if namespace_of(pid) in spaces]
        return found + [pid for pid in all_processes() if self._started(pid)]

    def _started(self, pid: int) -> bool:
        """Return whether a process belongs to a job, by its environment."""
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False  # it ended while we looked
        ours = f"SLURM_CONF={self.config_path}\0".encode() in environ
        return ours and (b"\0SLURM_JOB_ID=" in environ or "slurmstepd" in command_name(pid))

    def logs(self, num_lines: int = 40) -> str:
        """Return the ends of all daemons' logs."""
        parts = []
        for path in sorted((self.folder / "log").glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()[-num_lines:]
            parts.append("\n".join([f"--- {path.name}", *lines]))
        return "\n".join(parts)

    def save(self) -> None:
        record = asdict(self) | {"folder": str(self.folder)}
        record["spaces"] = {n: namespace_of(m.holder) for n, m in self.machines.items()}
        (self.folder / RECORD).write_text(json.dumps(record))


def up(
    folder: Path, num_nodes: int = 4, gpus_per_node: int = 2, variant: str | None = None
) -> Cluster:
    """Start a cluster in a folder that is new or empty, and wait until it takes jobs.

    Args:
        folder: where all its files go.
        num_nodes: nodes n1, n2, …
        gpus_per_node: copies of the null device that Slurm gives to jobs as GPUs.
        variant: ``namespaces`` (nodes with host name, network and disk of their own), ``simple``
            (daemons side by side), None: namespaces where they are allowed.
    """
    if reason := missing():
        raise ClusterError(reason)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ClusterError(f"{folder} is not empty; `down` ends the cluster that may be in it")
    variant = variant or ("namespaces" if can_make_machines() else "simple")
    cluster = Cluster(folder.resolve(), variant, num_nodes, gpus_per_node)
    try:
        make_folders(cluster)
        if variant == "namespaces":
            _make_network(cluster)
        else:
            name_nodes(cluster)
        write_config(cluster)
        _start_daemons(cluster)
        cluster.wait_until_idle()
    except BaseException:
        down(cluster, keep_folder=True)
        raise
    return cluster


def down(cluster: Cluster, keep_folder: bool = False) -> None:
    """End a cluster with everything that runs on it and remove its folder."""
    for name in ("slurmctld", "munged"):
        if name in cluster.daemons:
            with contextlib.suppress(ClusterError):  # then by force, as whatever is on the nodes
                end_processes([cluster.daemons[name]], signal.SIGTERM)
    end_processes(cluster.processes())
    unname_nodes(cluster)
    if not keep_folder:
        shutil.rmtree(cluster.folder)


def load(folder: Path) -> Cluster:
    """Return the cluster that another process started in a folder."""
    values = json.loads((folder / RECORD).read_text())
    spaces = values.pop("spaces")
    machines = {n: Machine(**m) for n, m in values.pop("machines").items()}
    # A number may meanwhile be another process's.
    alive = {n: m for n, m in machines.items() if namespace_of(m.holder) == spaces[n]}
    daemons = {n: p for n, p in values.pop("daemons").items() if command_name(p) == n.split(".")[0]}
    folder = Path(values.pop("folder"))
    return Cluster(folder=folder, machines=alive, daemons=daemons, **values)


def missing() -> str:
    """Return why no cluster can be started here, "" if one can."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if os.geteuid() != 0:
        absent.insert(0, "root")
    return f"needs {', '.join(absent)}: {INSTALL}" if absent else ""


def _make_network(cluster: Cluster) -> None:
    """Make the switch and the nodes, each with its address, names, disk and shared memory."""
    cluster.network = free_network(cluster.tag)
    network, folder = cluster.network, cluster.folder
    host = f"{network}.1 {socket.gethostname().partition('.')[0]}"
    names = [f"{network}.{11 + i} {node}" for i, node in enumerate(cluster.nodes)]
    hosts = folder / "hosts"
    hosts.write_text("\n".join(["127.0.0.1 localhost", host, *names]) + "\n")
    switch = cluster.machines["switch"] = start_switch()
    plug_in_host(switch, f"k{cluster.tag}", f"{network}.1/24")
    for number, node in enumerate(cluster.nodes):
        setup = [
            f"mount --bind '{hosts}' /etc/hosts",
            f"mount --bind '{folder}/disk/{node}' '{cluster.scratch}'",
            "mount -t tmpfs tmpfs /dev/shm",
        ]
        machine = cluster.machines[node] = start_machine(node, setup)
        connect(switch, node, machine, f"{network}.{11 + number}/24")
    cluster.save()


def _start_daemons(cluster: Cluster) -> None:
    folder = cluster.folder
    cluster.daemons["munged"] = start(
        ["munged", "--foreground", "--force", f"--socket={folder}/run/munge.socket",
         f"--key-file={folder}/munge/key", f"--log-file={folder}/log/munged.log",
         f"--pid-file={folder}/run/munged.pid", f"--seed-file={folder}/munge/seed"]
    )  # fmt: skip
    _wait_for(folder / "run" / "munge.socket")
    config, environ = str(cluster.config_path), cluster.environ
    cluster.daemons["slurmctld"] = start(["slurmctld", "-D", "-f", config], env=environ)
    cluster.save()
    for node in cluster.nodes:
        command = ["slurmd", "-D", "-f", config, "-N", node]
        if node in cluster.machines:
            start(cluster.machines[node].inside(*command), env=environ)
        else:
            cluster.daemons[f"slurmd.{node}"] = start(command, env=environ)
    cluster.save()


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise ClusterError(f"{path} never appeared")
        time.sleep(0.02)


@contextlib.contextmanager
def running(folder: Path, num_nodes: int = 4, variant: str | None = None) -> Iterator[Cluster]:
    """Hold a cluster inside the block; it also ends when this process is killed."""
    cluster = up(folder, num_nodes, variant=variant)
    keeper = start([sys.executable, __file__, "guard", str(folder), str(os.getpid())])
    try:
        yield cluster
    finally:
        end_processes([keeper])
        down(cluster)


def guard(cluster: Cluster, owner: int) -> None:
    """End a cluster as soon as the process that started it is gone."""
    while is_alive(owner):
        time.sleep(0.5)
    down(cluster)


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    if options.action == "up":
        cluster = up(options.folder, options.nodes, options.gpus_per_node, options.variant)
        print(f"export SLURM_CONF={cluster.config_path}")
        return 0
    cluster = load(options.folder)
    if options.action == "run":
        inside = cluster.machines[options.node].inside(*options.command)
        return subprocess.run(inside, env=cluster.environ).returncode
    if options.action == "guard":
        guard(cluster, options.owner)
    elif options.action == "logs":
        print(cluster.logs())
    elif options.action == "down":
        down(cluster)
    else:
        {"cut": cluster.cut, "restore": cluster.restore}[options.action](options.node)
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    named = {name: actions.add_parser(name) for name in ("up", "down", "logs", "guard")}
    named |= {name: actions.add_parser(name) for name in ("run", "cut", "restore")}
    for action in named.values():
        action.add_argument("folder", type=Path)
    for name in ("run", "cut", "restore"):
        named[name].add_argument("node")
    named["up"].add_argument("--nodes", type=int, default=4)
    named["up"].add_argument("--gpus-per-node", type=int, default=2)
    named["up"].add_argument("--variant", choices=("namespaces", "simple"))
    named["run"].add_argument("command", nargs=argparse.REMAINDER)
    named["guard"].add_argument("owner", type=int)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
