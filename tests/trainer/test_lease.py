"""Numbered leases on a run folder."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from trainer import lease
from trainer.errors import LeaseError
from trainer.lease import Lease, Process, lease_path, newest_token, read_holder

LIFE: dict[str, Any] = {"job": None, "restart": 0}


def take(folder: Path, token: int, **life: Any) -> Lease | None:
    return Lease.take(folder, token, LIFE | life, "2026-01-01T00:00:00+00:00")


def test_a_token_is_taken_once_and_tells_who_has_it(tmp_path: Path) -> None:
    assert newest_token(tmp_path) == 0 and read_holder(tmp_path) is None
    first = take(tmp_path, 1, job="17", restart=2)
    assert first is not None and take(tmp_path, 1) is None
    holder = read_holder(tmp_path)
    assert holder is not None and holder.process == Process.own() and holder.process.is_alive()
    assert (holder.token, holder.job, holder.restart, holder.has_ended) == (1, "17", 2, False)
    assert [path.name for path in (tmp_path / "leases").iterdir()] == ["00001.json"]


def test_a_lease_that_a_power_failure_emptied_locks_nobody_out(tmp_path: Path) -> None:
    assert take(tmp_path, 1, job="17")
    lease_path(tmp_path, 1).write_text("")
    holder = read_holder(tmp_path)
    assert holder is not None and (holder.token, holder.job) == (1, None)
    assert "JSONDecodeError" in holder.damage and not holder.process.is_visible()
    assert take(tmp_path, holder.token + 1)


def test_an_older_life_is_stopped_by_name(tmp_path: Path) -> None:
    old = take(tmp_path, 1, job="17")
    assert old is not None
    old.check()
    new = take(tmp_path, 2, job="17", restart=1)
    assert new is not None
    new.check()
    with pytest.raises(LeaseError, match=r"belongs to life 2 \(Slurm job 17 on .*this is life 1"):
        old.check()


def test_a_listing_of_a_moment_ago_stops_nobody(tmp_path: Path) -> None:
    assert take(tmp_path, 1)
    Lease(tmp_path, 2).check()  # life 2 itself, where its file is not seen yet


def test_the_heartbeat_dates_the_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.01)
    own = take(tmp_path, 1)
    assert own is not None
    path = lease_path(tmp_path, 1)
    os.utime(path, (1000, 1000))
    beaten = threading.Event()
    touch = os.utime

    def observed(path: Path) -> None:
        touch(path)
        beaten.set()

    monkeypatch.setattr(os, "utime", observed)
    with own.beating():
        assert beaten.wait(10)
    holder = read_holder(tmp_path)
    assert holder is not None and holder.heartbeat > 1000


def test_a_missed_heartbeat_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.01)
    tried = threading.Event()

    def fail(path: Path) -> None:
        tries.append(path)
        if len(tries) == 3:
            tried.set()
        raise OSError(5, "Input/output error")

    tries: list[Path] = []
    monkeypatch.setattr(os, "utime", fail)
    own = take(tmp_path, 1)
    assert own is not None
    with own.beating():
        assert tried.wait(10)
    assert caplog.text.count("no heartbeat") == 1


def test_another_boot_or_namespace_is_not_judged_from_here() -> None:
    own = Process.own()
    assert own.is_visible()
    assert not Process("other", own.namespace, own.pid, own.started).is_visible()
    assert not Process(own.boot, own.namespace, own.pid, own.started + 1).is_alive()
