"""Names, interfaces and ports of this machine."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, field

import psutil

from launch.checks.finding import Finding, error, ok, warning

TOPIC = "network"
HOSTS = "ask the site's administrators, or /etc/hosts on a machine of your own"


@dataclass(frozen=True)
class NetworkFacts:
    """How this machine is called and reached.

    Attributes:
        hostname: what the machine calls itself.
        addresses: what that name resolves to here.
        localhost: what ``localhost`` resolves to here.
        interfaces: every interface, and whether it is up.
        interface: the one that the profile names for collectives.
        port: the one that ranks would meet at.
        is_port_free: whether it can be listened on.
    """

    hostname: str
    addresses: list[str]
    localhost: list[str]
    interfaces: dict[str, bool] = field(default_factory=dict)
    interface: str | None = None
    port: int = 0
    is_port_free: bool = True


def gather(interface: str | None, port: int) -> NetworkFacts:
    """Ask the resolver and the kernel."""
    name = socket.gethostname()
    return NetworkFacts(
        hostname=name,
        addresses=resolve(name),
        localhost=resolve("localhost"),
        interfaces={key: stats.isup for key, stats in psutil.net_if_stats().items()},
        interface=interface,
        port=port,
        is_port_free=can_listen(port),
    )


def resolve(name: str) -> list[str]:
    """Return the addresses of ``name`` in the resolver's order; empty when it has none."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def can_listen(port: int) -> bool:
    """Return whether a rank could listen on ``port`` now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def judge(facts: NetworkFacts, is_compute_node: bool) -> list[Finding]:
    """Judge names, interface and port; a login node may lack the compute nodes' interface."""
    findings = [_judge_hostname(facts, is_compute_node), *_judge_localhost(facts)]
    if facts.interface is not None:
        findings.append(_judge_interface(facts, facts.interface, is_compute_node))
    if not facts.is_port_free:
        why = "rank 0 listens there; ranks that start now would meet the process that holds it"
        remedy = f"look who does with `ss -ltnp sport = :{facts.port}`, or set MASTER_PORT"
        findings.append(error(TOPIC, f"port {facts.port} is taken", why, remedy))
    return findings


def _judge_hostname(facts: NetworkFacts, is_compute_node: bool) -> Finding:
    if not facts.addresses:
        why = "gloo and MPI look up a rank's own name and fail without an address"
        return error(TOPIC, f"{facts.hostname} has no address", why, HOSTS)
    what = f"{facts.hostname} is {', '.join(facts.addresses)}"
    if is_compute_node and all(_is_loopback(address) for address in facts.addresses):
        why = "other nodes that are told this address would call themselves"
        return warning(TOPIC, what, why, f"give the name its network address: {HOSTS}")
    return ok(TOPIC, what)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _judge_localhost(facts: NetworkFacts) -> list[Finding]:
    if "127.0.0.1" in facts.localhost:
        return []
    found = ", ".join(facts.localhost) or "nothing"
    why = "the ranks of one machine meet at 127.0.0.1"
    return [warning(TOPIC, f"localhost is {found}", why, f"add `127.0.0.1 localhost`: {HOSTS}")]


def _judge_interface(facts: NetworkFacts, interface: str, is_compute_node: bool) -> Finding:
    state = facts.interfaces.get(interface)
    if state:
        return ok(TOPIC, f"interface {interface} is up")
    up = [name for name, is_up in facts.interfaces.items() if is_up and name != "lo"]
    there = f"up are {', '.join(up) or 'none'}"
    fault = "is down" if state is False else "does not exist"
    what = f"interface {interface} {fault} on {facts.hostname}"
    why = f"the profile names it for collectives, which would hang; {there}"
    remedy = "set cluster.site.interface to one of the compute nodes, or null to leave it to NCCL"
    if not is_compute_node:
        why = f"the profile names it for collectives; a login node may lack it ({there})"
        return warning(TOPIC, what, why, "kuroshio doctor --nodes 2 looks on compute nodes")
    return error(TOPIC, what, why, remedy)
