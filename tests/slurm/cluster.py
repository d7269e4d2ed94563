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
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cluster_jobs import Jobs
from cluster_nodes import (
    ClusterError,
    Machine,
    all_processes,
    call,
    can_make_machines,
    command_name,
    connect,
    end_processes,
    is_alive,
    namespace_of,
    start,
    start_machine,
    start_switch,
)

HERE = Path(__file__).resolve().parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "nsenter")
INSTALL = "apt-get install slurmctld slurmd slurm-client munge iproute2 util-linux"
RECORD = "cluster.json"
NODE_PORT = 26818
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

    def restore(self, node: str) -> None:
        """Plug a node's network cable in again and wait until Slurm uses it."""
        self.machines["switch"].call("ip", "link", "set", node, "up")
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
        _make_folders(cluster)
        if variant == "namespaces":
            _make_network(cluster)
        else:
            _name_nodes(cluster)
        _write_config(cluster)
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
    _unname_nodes(cluster)
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


def _make_folders(cluster: Cluster) -> None:
    own = [f"{part}/{node}" for part in ("spool", "disk") for node in cluster.nodes]
    for name in ("run", "log", "state", "munge", "dev", "scratch", *own):
        (cluster.folder / name).mkdir(parents=True)
    for number in range(cluster.gpus_per_node):
        path = cluster.folder / "dev" / f"nvidia{number}"
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    key = cluster.folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)


def _make_network(cluster: Cluster) -> None:
    """Make the switch and the nodes, each with its address, names, disk and shared memory."""
    cluster.network = _free_network(cluster.tag)
    network, folder = cluster.network, cluster.folder
    host = f"{network}.1 {socket.gethostname().partition('.')[0]}"
    names = [f"{network}.{11 + i} {node}" for i, node in enumerate(cluster.nodes)]
    hosts = folder / "hosts"
    hosts.write_text("\n".join(["127.0.0.1 localhost", host, *names]) + "\n")
    cluster.machines["switch"] = start_switch(f"k{cluster.tag}", f"{network}.1/24")
    for number, node in enumerate(cluster.nodes):
        setup = [
            f"mount --bind '{hosts}' /etc/hosts",
            f"mount --bind '{folder}/disk/{node}' '{cluster.scratch}'",
            "mount -t tmpfs tmpfs /dev/shm",
        ]
        machine = cluster.machines[node] = start_machine(node, setup)
        connect(cluster.machines["switch"], node, machine, f"{network}.{11 + number}/24")
    cluster.save()


def _free_network(tag: str) -> str:
    """Return the first three numbers of a network that this host does not use."""
    used = call("ip", "-o", "address")
    first = int(tag, 16)
    candidates = (f"10.{100 + n // 256 % 100}.{n % 256}" for n in range(first, first + 25600))
    return next(network for network in candidates if f" {network}." not in used)


def _write_config(cluster: Cluster) -> None:
    folder, host = cluster.folder, socket.gethostname().partition(".")[0]
    simple = cluster.variant == "simple"
    plugin = any(Path("/usr/lib").glob("**/slurm*/job_submit_lua.so"))
    template = (HERE / "slurm.conf.template").read_text()
    addresses = f"NodeAddr={cluster.network}.[11-{10 + cluster.num_nodes}]"
    text = template.format(
        name=f"k{cluster.tag}",
        host=host,
        controller_address="127.0.0.1" if simple else f"{cluster.network}.1",
        controller_port=_free_port(),
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
    lines = [f"NodeName={node} {where} Port={_free_port()} {facts}" for node in nodes]
    return text.replace(line, "\n".join(lines))


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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _name_nodes(cluster: Cluster) -> None:
    """Let this host know the nodes' names; without mounts, only its own table can."""
    with Path("/etc/hosts").open("a") as hosts:
        hosts.write(f"127.0.0.1 {' '.join(cluster.nodes)} {_mark(cluster)}\n")


def _unname_nodes(cluster: Cluster) -> None:
    hosts = Path("/etc/hosts")
    lines = hosts.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.endswith(f"{_mark(cluster)}\n")]
    if kept != lines:
        hosts.write_text("".join(kept))


def _mark(cluster: Cluster) -> str:
    return f"# cluster {cluster.tag}"


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
    parser = argparse.ArgumentParser(description=__doc__)
    actions = ("up", "down", "run", "cut", "restore", "logs", "guard")
    parser.add_argument("action", choices=actions)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--gpus-per-node", type=int, default=2)
    parser.add_argument("--variant", choices=("namespaces", "simple"))
    parser.add_argument("words", nargs=argparse.REMAINDER, help="a node, a command to run on it")
    options = parser.parse_args(arguments)
    if options.action == "up":
        cluster = up(options.folder, options.nodes, options.gpus_per_node, options.variant)
        print(f"export SLURM_CONF={cluster.config_path}")
        return 0
    cluster = load(options.folder)
    if options.action == "down":
        down(cluster)
    elif options.action == "guard":
        guard(cluster, int(options.words[0]))
    elif options.action == "logs":
        print(cluster.logs())
    elif options.action == "run":
        node, *command = options.words
        inside = cluster.machines[node].inside(*command)
        return subprocess.run(inside, env=cluster.environ).returncode
    else:
        {"cut": cluster.cut, "restore": cluster.restore}[options.action](*options.words)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
