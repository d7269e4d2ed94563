"""Let the nodes of a cluster reach each other by ssh, with keys that exist in its folder only."""

from __future__ import annotations

import time

from cluster import Cluster
from cluster_nodes import ClusterError, call, start

SERVER = """
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
"""
CLIENT = """
Host *
    User root
    IdentityFile {folder}/user_key
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""
START_TIMEOUT_S = 20


def start_ssh(cluster: Cluster, *nodes: str) -> None:
    """Start sshd on nodes of a cluster in namespaces and wait until they answer."""
    folder = cluster.folder / "ssh"
    folder.mkdir()
    for name in ("host_key", "user_key"):
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name)
    (folder / "sshd_config").write_text(SERVER.format(folder=folder))
    (folder / "ssh_config").write_text(CLIENT.format(folder=folder))
    for node in nodes:
        machine = cluster.machines[node]
        # Seen on this node only: the folder sshd wants, and what `ssh` reads without being told.
        machine.call("mount", "-t", "tmpfs", "tmpfs", "/run")
        machine.call("mkdir", "/run/sshd")
        machine.call("mount", "--bind", folder / "ssh_config", "/etc/ssh/ssh_config")
        start(machine.inside("/usr/sbin/sshd", "-D", "-f", str(folder / "sshd_config")))
    for node in nodes:
        _wait_for_answer(cluster, nodes[0], node)


def _wait_for_answer(cluster: Cluster, source: str, target: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            answer = cluster.machines[source].call("ssh", target, "hostname")
        except ClusterError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
            continue
        if answer.strip() != target:
            raise ClusterError(f"ssh {target} from {source} reached {answer.strip()}")
        return
