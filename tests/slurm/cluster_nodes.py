"""Machines made of namespaces: each with a host name, network, disks and processes of its own.

A machine lives as long as its first process. With that ends everything on it, and interfaces and
mounts are gone. Nothing is registered under /run/netns.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "ib0"
START_TIMEOUT_S = 30
# A machine's first process: it collects ended processes that have lost their parents.
IDLE = "while :; do sleep 1 & wait; done"
QUIET = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


class ClusterError(RuntimeError):
    """Something of the cluster did not start or end as it should."""


def call(*command: str | Path, timeout_s: float = 60) -> str:
    """Run a command; return what it printed.

    Raises:
        ClusterError: with its output, when it fails.
    """
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode:
        raise ClusterError(f"{shlex.join(words)}: {done.stdout}{done.stderr}")
    return done.stdout


def start(command: Sequence[str], **options: object) -> int:
    """Start a daemon that holds none of our pipes; return its process."""
    return subprocess.Popen(command, start_new_session=True, **QUIET, **options).pid  # type: ignore


@dataclass(frozen=True)
class Machine:
    """The namespaces of a machine, kept by the process ``holder``."""

    name: str
    holder: int

    def inside(self, *command: str | Path) -> list[str]:
        """Return ``command`` as one to run on this machine."""
        enter = ["nsenter", f"--target={self.holder}", "--net", "--uts", "--mount", "--pid"]
        return [*enter, f"--wd={Path.cwd()}", *(str(word) for word in command)]

    def call(self, *command: str | Path, timeout_s: float = 60) -> str:
        """Run a command on this machine; return what it printed."""
        return call(*self.inside(*command), timeout_s=timeout_s)

    def processes(self) -> list[int]:
        """Return the processes that run on this machine, by their numbers on the host."""
        space = namespace_of(self.holder)
        return [pid for pid in all_processes() if space and namespace_of(pid) == space]


def start_machine(name: str, setup: Sequence[str] = ()) -> Machine:
    """Make a machine without interfaces but ``lo``; ``setup`` are shell lines run on it first."""
    lines = ["set -e", f"hostname {name}", "ip link set lo up", *setup, f"exec sh -c '{IDLE}'"]
    spaces = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc"]
    outer = start([*spaces, "--propagation=private", "sh", "-c", "\n".join(lines)])
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        holder = next(iter(children_of(outer)), 0)
        if holder and command_line(holder).startswith(f"sh -c {IDLE}"):
            return Machine(name, holder)
        if not is_alive(outer) or time.monotonic() > deadline:
            end_processes([outer, *children_of(outer)])
            raise ClusterError(f"machine {name} did not start: {lines}")
        time.sleep(0.01)


def connect(switch: Machine, port: str, machine: Machine, address: str) -> None:
    """Give ``machine`` the interface ib0 with ``address``, on port ``port`` of the switch."""
    peer = ["peer", "name", INTERFACE, "netns", str(machine.holder)]
    call("ip", "link", "add", port, "netns", str(switch.holder), "type", "veth", *peer)
    switch.call("ip", "link", "set", port, "master", "bridge", "up")
    machine.call("ip", "address", "add", address, "dev", INTERFACE)
    machine.call("ip", "link", "set", INTERFACE, "up")


def start_switch() -> Machine:
    """Make a machine that is a network switch.

    It has a network namespace of its own, where no firewall rule of the host drops its packets.
    """
    return start_machine("switch", ["ip link add bridge type bridge", "ip link set bridge up"])


def plug_in_host(switch: Machine, interface: str, address: str) -> None:
    """Give this host an interface with ``address`` on the switch; it goes with the switch."""
    peer = ["peer", "name", "host", "netns", str(switch.holder)]
    call("ip", "link", "add", interface, "type", "veth", *peer)
    switch.call("ip", "link", "set", "host", "master", "bridge", "up")
    call("ip", "address", "add", address, "dev", interface)
    call("ip", "link", "set", interface, "up")


def can_make_machines() -> bool:
    """Return whether namespaces, bridges and private mounts are allowed here."""
    try:
        machine = start_machine("trial", ["ip link add bridge type bridge"])
    except (ClusterError, OSError):
        return False
    end_processes(machine.processes())
    return True


def all_processes() -> list[int]:
    """Return the processes of this host that are no zombies."""
    numbers = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in numbers if is_alive(pid)]


def command_name(pid: int) -> str:
    """Return the name of a living process, "" of one that is gone."""
    text = read_stat(pid)
    return text[text.index("(") + 1 : text.rindex(")")] if is_alive(pid) else ""


def is_alive(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    text = read_stat(pid)
    return bool(text) and text[text.rindex(")") + 2] not in "ZX"


def children_of(pid: int) -> list[int]:
    """Return the living processes whose parent is ``pid``."""
    own = {child: read_stat(child).rpartition(")")[2].split() for child in all_processes()}
    return [child for child, fields in own.items() if fields[1:2] == [str(pid)]]


def command_line(pid: int) -> str:
    """Return the words of a process's command, "" when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def read_stat(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def namespace_of(pid: int) -> str:
    """Return the network namespace of a process, "" when it is gone."""
    try:
        return str(Path(f"/proc/{pid}/ns/net").readlink())
    except OSError:
        return ""


def end_processes(pids: Sequence[int], number: int = signal.SIGKILL) -> None:
    """Send a signal to processes, some of which may be gone, and wait until all are."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
    deadline = time.monotonic() + START_TIMEOUT_S
    while any(is_alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            raise ClusterError(f"processes that do not end: {[p for p in pids if is_alive(p)]}")
        time.sleep(0.02)
    for pid in pids:
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            continue  # not a child of ours
