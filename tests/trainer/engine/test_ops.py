"""The lock of a dead build is removed; a living builder's is not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.config import EngineConfig
from trainer.engine import ops
from trainer.errors import ConfigError


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def lock(folder: Path, host: str, pid: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lock").touch()
    (folder / ops.CLAIM).write_text(json.dumps({"host": host, "pid": pid}))


def test_staleness(tmp_path: Path) -> None:
    assert not ops.is_stale(tmp_path)
    lock(tmp_path, socket.gethostname(), os.getpid())
    assert not ops.is_stale(tmp_path)
    lock(tmp_path, socket.gethostname(), dead_pid())
    assert ops.is_stale(tmp_path)
    lock(tmp_path, "another-host", dead_pid())
    assert not ops.is_stale(tmp_path)
    long_ago = time.time() - ops.STALE_LOCK_S - 1
    os.utime(tmp_path / "lock", (long_ago, long_ago))
    assert ops.is_stale(tmp_path)
    lock(tmp_path, socket.gethostname(), os.getpid())  # slow, but alive
    os.utime(tmp_path / "lock", (long_ago, long_ago))
    assert not ops.is_stale(tmp_path)


@pytest.mark.faults(row=23)
def test_dead_lock_is_removed_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock(tmp_path / "cpu_adam", socket.gethostname(), dead_pid())
    seen = []

    def load(op: str) -> None:
        claim = json.loads((tmp_path / op / ops.CLAIM).read_text())
        seen.append((op, (tmp_path / op / "lock").exists(), claim["pid"]))

    ops.build_ops(["cpu_adam"], 0, load)
    assert seen == [("cpu_adam", False, os.getpid())]
    assert not (tmp_path / "cpu_adam" / ops.CLAIM).exists()


def test_failed_build_names_the_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))

    def load(op: str) -> None:
        raise RuntimeError("libaio.h: No such file")

    with pytest.raises(ConfigError, match=r"async_io op, which needs .*libaio-dev.*libaio\.h"):
        ops.build_ops(["async_io"], 0, load)


def test_only_offload_needs_ops() -> None:
    assert ops.needed_ops(EngineConfig(zero_stage=3)) == []
    assert ops.needed_ops(EngineConfig(zero_stage=2, offload_optimizer="cpu")) == ["cpu_adam"]
    nvme = EngineConfig(zero_stage=3, offload_optimizer="nvme", nvme_path="/local")
    assert ops.needed_ops(nvme) == ["cpu_adam", "async_io"]
