"""Which runs a folder stands for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_folders import RunFolder

from launch.json_file import read_json
from launch.monitor.sources import find_sources
from trainer.errors import StorageError

NOBODY = 65534


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder of two runs, one of which we may not read, relative to itself."""
    for name, mode in (("ours", 0o755), ("theirs", 0)):
        run = RunFolder(tmp_path / name, 0).submitted("7")
        run.path.chmod(mode)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # the way there is not open to others
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(NOBODY)  # root may read everything
    yield Path()
    if was_root:
        os.seteuid(0)
    (tmp_path / "theirs").chmod(0o755)


def test_runs_of_others_are_passed_over(runs: Path) -> None:
    assert [source.name for source in find_sources(runs)] == ["ours"]
    with pytest.raises(StorageError, match=r"theirs/submit.json cannot be read: Permission denied"):
        read_json(runs / "theirs/submit.json")


def test_links_are_not_followed(tmp_path: Path) -> None:
    RunFolder(tmp_path / "a/run", 0).submitted("7")
    (tmp_path / "a/latest").symlink_to("run")
    (tmp_path / "a/circle").symlink_to(tmp_path)
    assert [source.name for source in find_sources(tmp_path)] == ["a/run"]
