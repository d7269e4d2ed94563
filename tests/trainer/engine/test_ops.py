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
@pytest.mark.parametrize(
    ("op", "folder"),
    [("cpu_adam", "cpu_adam"), ("async_io", "async_io"), ("async_io", "pin_memory")],
)
def test_dead_lock_is_removed_before_loading(
    op: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock(tmp_path / folder, socket.gethostname(), dead_pid())
    seen = []

    def load(name: str) -> None:
        claim = json.loads((tmp_path / folder / ops.CLAIM).read_text())
        seen.append((name, (tmp_path / folder / "lock").exists(), claim["pid"]))

    ops.build_ops([op], 0, load)
    assert seen == [(op, False, os.getpid())]
    assert not (tmp_path / folder / ops.CLAIM).exists()


@pytest.mark.slow
def test_every_folder_that_loading_builds_in_is_known(cpu_adam: None, async_io: None) -> None:
    """DeepSpeed may come to build another op along with one of these."""
    script = """
import sys
from torch.utils import cpp_extension
from build_ops import keep_ops_in_venv, main
keep_ops_in_venv()
find = cpp_extension._get_build_directory
def note(name, verbose):
    print("built in", name)
    return find(name, verbose)
cpp_extension._get_build_directory = note
main(sys.argv[1:])
"""
    for op, folders in ops.BUILT_WITH.items():
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", script, op], env=environ, capture_output=True, text=True
        )
        names = {x.rpartition(" ")[2] for x in done.stdout.splitlines() if x.startswith("built")}
        assert names == set(folders), done.stdout + done.stderr


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
