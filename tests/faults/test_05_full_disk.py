"""A disk, quota or table of files that is full while saving: said with its path, nothing lost."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from tiny_engine import TinyEngine, loaded_weights, save, save_steps
from training_support import read_losses, run_chains

from trainer.config import LoopConfig
from trainer.engine import shard_file
from trainer.engine.committed import find_newest
from trainer.engine.manifest import list_leftovers, list_steps
from trainer.engine.saver import Saver
from trainer.errors import StorageError

pytestmark = pytest.mark.faults(row=5)
WAYS: dict[str, dict[str, Any]] = {"asynchronous": {}, "blocking": {"save_async": False}}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Return a file system that holds one checkpoint of a tiny engine and 30 files."""
    if os.geteuid():
        pytest.skip("a small tmpfs needs root: run as root, as CI does")
    path = tmp_path / "disk"
    path.mkdir()
    options = "size=64k,nr_inodes=30"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


def refuse(folder: Path, **loop: Any) -> str:
    """Save step 4 where it cannot be written; return what is said."""
    engine = TinyEngine()
    for _ in range(4):
        engine.step()
    with pytest.raises(StorageError) as error:
        save(engine, folder, 4, **{"keep_last": 1, **loop})
    assert error.value.exit_code == 74
    assert [path.name for path in list_steps(folder)] == ["step_00000002"]
    assert list_leftovers(folder) == []
    return str(error.value)


@pytest.mark.parametrize("way", WAYS)
def test_a_full_disk_is_named_and_the_last_checkpoint_stays(disk: Path, way: str) -> None:
    folder = disk / "checkpoints"
    weights = save_steps(folder, [2], **WAYS[way])
    said = refuse(folder, **WAYS[way])
    assert f"checkpoint in {folder} was not saved: disk full or quota reached" in said
    assert "MB, " in said and "free). Earlier checkpoints are intact; free space" in said
    step, loaded = loaded_weights(folder)
    assert step == 2 and all(torch.equal(loaded[name], weights[2][name]) for name in loaded)
    subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
    save_steps(folder, [4], keep_last=1)
    assert [path.name for path in list_steps(folder)] == ["step_00000004"]


def test_a_file_system_without_inodes_says_so(disk: Path) -> None:
    folder = disk / "checkpoints"
    save_steps(folder, [2])
    subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
    fillers = []
    with pytest.raises(OSError, match="No space"):
        while True:
            fillers.append(disk / f"{len(fillers)}")
            fillers[-1].touch()
    said = refuse(folder)
    assert "disk full or quota reached" in said and " MB, 0 files free)" in said
    for filler in fillers:
        filler.unlink(missing_ok=True)
    save_steps(folder, [4])
    assert find_newest(folder).step == 4  # type: ignore[union-attr]


def test_a_limit_on_the_size_of_files_is_named(tmp_path: Path) -> None:
    save_steps(tmp_path, [2])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        said = refuse(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in said


def test_a_quota_that_is_reached_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few kernels and no container have quotas to try: the write that would hit one says so."""
    save_steps(tmp_path, [2])
    write, left = shard_file._write_all, 20_000

    def write_within_quota(file: BinaryIO, piece: memoryview) -> None:
        nonlocal left
        left -= len(piece)
        if left < 0:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        write(file, piece)

    monkeypatch.setattr(shard_file, "_write_all", write_within_quota)
    assert "disk full or quota reached" in refuse(tmp_path)


def test_a_failure_beside_training_is_a_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which ranks agree on at the next step, long before the next save would find it."""

    def fail(file: BinaryIO, piece: memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    asked: list[str] = []
    engine = TinyEngine()
    engine.step()
    with (
        pytest.raises(StorageError, match="disk full"),
        Saver(engine, tmp_path, LoopConfig(), on_failure=lambda: asked.append("stop")) as saver,  # type: ignore[arg-type]
    ):
        monkeypatch.setattr(shard_file, "_write_all", fail)
        saver.begin(1, {})
        pending = saver._pending
        assert pending is not None and pending._thread is not None
        pending._thread.join()
        saver.poll()  # no error here: one rank alone must not leave
        assert asked == ["stop"]
        monkeypatch.undo()
        saver.begin(2, {})  # the next save raises what the one before it could not do
    assert list_steps(tmp_path) == [] and list_leftovers(tmp_path) == []


@pytest.mark.slow
def test_a_run_on_a_full_disk_exits_74_and_goes_on_when_there_is_space(
    vary: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    if os.geteuid():
        pytest.skip("a small tmpfs needs root: run as root, as CI does")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
    changes: dict[str, Any] = {"loop__save_every": 2, "loop__keep_last": 1, "loop__max_steps": 8}
    config = vary(disk / "run", **changes)

    def life(code: int) -> list[list[dict[str, Any]]]:
        return [[{"num_ranks": 2, "scenarios": [{"config": config}], "code": code}]]

    try:
        assert run_chains(life(74), tmp_path) == []
        log = (tmp_path / "chains_0/chain_0_life_0.0.log").read_text()
        # Training goes on beside the save, and its journal may be the first to find no space.
        assert (
            "was not saved: disk full or quota reached" in log or "metrics.jsonl: No space" in log
        )
        newest = find_newest(disk / "run/checkpoints")
        assert newest is not None and newest.step == 2
        assert list_leftovers(disk / "run/checkpoints") == []
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        assert run_chains(life(0), tmp_path) == []
        assert read_losses(disk / "run").keys() == set(range(1, 9))
        # The older one went only after the commit.
        assert [path.name for path in list_steps(disk / "run/checkpoints")] == ["step_00000008"]
    finally:
        subprocess.run(["umount", disk], check=True)
