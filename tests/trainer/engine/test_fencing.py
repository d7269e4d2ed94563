"""An older life's ranks cannot put a checkpoint or figures into a newer one's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.config import LogConfig
from trainer.engine import checkpoint
from trainer.errors import LeaseError, StorageError
from trainer.lease import Lease
from trainer.metrics.journal import Journal
from trainer.metrics.sinks import Sinks


@pytest.fixture
def leases(tmp_path: Path) -> tuple[Lease, Lease]:
    """Return the lease of a life that was given up for lost, and of the one after it."""
    taken = [Lease.take(tmp_path, n, {"job": "17", "restart": n - 1}, "now") for n in (1, 2)]
    assert taken[0] and taken[1]
    return taken[0], taken[1]


def commit(folder: Path, lease: Lease, content: str) -> None:
    aside, final = folder / f".step_4.life_{lease.token}.tmp", folder / "step_4"
    aside.mkdir(parents=True)
    (aside / "rank_00000.safetensors").write_text(content)
    checkpoint._commit(aside, final, {"step": 4, "by": content}, lease)


@pytest.mark.faults(row=13)
def test_a_checkpoint_is_committed_by_the_newest_life_only(
    tmp_path: Path, leases: tuple[Lease, Lease]
) -> None:
    old, new = leases
    folder = tmp_path / "checkpoints"
    commit(folder, new, "new")
    with pytest.raises(LeaseError, match="belongs to life 2"):
        commit(folder, old, "old")
    assert json.loads((folder / "step_4/manifest.json").read_text())["by"] == "new"
    assert not list(folder.glob(".step_4.old"))


@pytest.mark.faults(row=13)
def test_a_save_of_an_older_life_ends_as_what_it_is_and_cleans_up(
    tmp_path: Path, leases: tuple[Lease, Lease]
) -> None:
    drafts = [checkpoint.Draft(tmp_path / "checkpoints", 0, {"step": 4}, one) for one in leases]
    drafts[0].aside.mkdir(parents=True)
    with pytest.raises(LeaseError):
        checkpoint.together(lambda: checkpoint.begin(drafts[0], ""), drafts[0])
    assert not drafts[0].aside.exists()
    with pytest.raises(StorageError, match="disk full"):
        checkpoint.together(fill_disk, drafts[1])
    with pytest.raises(LeaseError):  # which was why: whatever its own failure was
        checkpoint.together(fill_disk, drafts[0])


def fill_disk() -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.faults(row=13)
def test_the_journal_is_appended_to_by_the_newest_life_only(
    tmp_path: Path, leases: tuple[Lease, Lease]
) -> None:
    path = tmp_path / "metrics.jsonl"
    zombie, living = (Journal(path, lease) for lease in leases)
    living.write({"split": "train", "step": 1})
    before = path.read_bytes()
    with pytest.raises(LeaseError):
        zombie.write({"split": "train", "step": 9})
    assert path.read_bytes() == before


def test_sinks_of_an_older_life_do_not_rewind_the_journal(
    tmp_path: Path, leases: tuple[Lease, Lease]
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"split": "train", "step": 9}\n')
    config = {"loop": {"max_steps": 10}}
    with pytest.raises(LeaseError):
        Sinks(tmp_path, LogConfig(), "run", config, True, 3, leases[0])
    assert '"step": 9' in path.read_text()
