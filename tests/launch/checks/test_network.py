"""Names, interfaces, ports."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest

from launch.checks.network import NetworkFacts, can_listen, gather, judge

FINE = NetworkFacts("n1", ["10.0.0.1"], ["127.0.0.1"], {"lo": True, "ib0": True, "eth1": False})


@pytest.mark.parametrize(
    ("changes", "in_job", "level", "words"),
    [
        ({}, True, "ok", ""),
        ({"addresses": []}, True, "error", "n1 has no address"),
        ({"addresses": ["127.0.1.1"]}, True, "warning", "would call themselves"),
        ({"addresses": ["127.0.1.1"]}, False, "ok", ""),
        ({"addresses": ["127.0.1.1", "fe80::1%ib0"]}, True, "ok", ""),
        ({"localhost": ["::1"]}, False, "warning", "localhost is ::1"),
        ({"interface": "ib0"}, True, "ok", ""),
        ({"interface": "ib1"}, True, "error", "ib1 does not exist on n1"),
        ({"interface": "ib1"}, False, "warning", "ib1 does not exist on n1"),
        ({"interface": "eth1"}, True, "error", "eth1 is down"),
        ({"is_port_free": False, "port": 20007}, False, "error", "port 20007 is taken"),
    ],
)
def test_judge(changes: dict[str, object], in_job: bool, level: str, words: str) -> None:
    found = judge(replace(FINE, **changes), in_job)  # type: ignore[arg-type]
    bad = [f for f in found if f.level != "ok"]
    assert [f.level for f in bad] == ([] if level == "ok" else [level])
    assert words in " ".join(f"{f.what} {f.why}" for f in bad)


def test_a_listener_makes_a_port_taken() -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert not can_listen(port)
        facts = gather("lo", port)
    assert not facts.is_port_free and facts.interfaces["lo"] and facts.hostname
    assert can_listen(port)
