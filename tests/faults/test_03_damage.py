"""A damaged checkpoint is found before any tensor is used; the one before it is taken, or none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_engine import loaded_weights, save_steps

from trainer.engine import committed
from trainer.engine.committed import find_newest
from trainer.errors import CheckpointError

SHARD = "rank_00000.safetensors"


def flip(path: Path, share: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(share * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bit in the header": (lambda p: flip(p / SHARD, 0.001), "does not match its SHA-256"),
    "bit in a tensor": (lambda p: flip(p / SHARD, 0.5), "does not match its SHA-256"),
    "last bit": (lambda p: flip(p / SHARD, 1.0), "does not match its SHA-256"),
    "truncated": (lambda p: cut(p / SHARD, 0.7), "bytes instead of"),
    "empty": (lambda p: (p / SHARD).write_bytes(b""), "has 0 bytes instead of"),
    "missing": (lambda p: (p / SHARD).unlink(), "is missing"),
    "a folder": (lambda p: ((p / SHARD).unlink(), (p / SHARD).mkdir()), "is missing"),
    "manifest cut": (lambda p: cut(p / "manifest.json", 0.5), "manifest unreadable"),
    "manifest empty": (lambda p: (p / "manifest.json").write_text(""), "manifest unreadable"),
    "manifest missing": (lambda p: (p / "manifest.json").unlink(), "manifest unreadable"),
    "manifest no object": (lambda p: (p / "manifest.json").write_text("[]"), "manifest unreadable"),
}


@pytest.mark.faults(row=3)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_walked_over_with_a_warning_or_refused(
    tmp_path: Path,
    damage: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = save_steps(tmp_path, [2, 4])
    do, what = DAMAGES[damage]
    do(tmp_path / "step_00000004")

    with monkeypatch.context() as patch:
        patch.setattr(committed, "safe_open", None)  # no tensor is looked at
        with pytest.raises(
            CheckpointError, match=r"damaged=refuse, and the newest .*00000004"
        ) as no:
            find_newest(tmp_path, "refuse")
        with caplog.at_level(logging.WARNING):
            newest = find_newest(tmp_path)
    assert what in str(no.value) and what in caplog.text
    assert "step_00000004 is damaged" in caplog.text and "walking back" in caplog.text
    assert newest is not None and newest.step == 2
    step, loaded = loaded_weights(tmp_path)
    assert step == 2 and all(torch.equal(loaded[name], weights[2][name]) for name in loaded)


@pytest.mark.faults(row=3)
@pytest.mark.faults(row=4)
def test_when_all_are_damaged_nothing_starts_from_scratch(tmp_path: Path) -> None:
    save_steps(tmp_path, [2, 4])
    for number, damage in ((4, "empty"), (2, "manifest cut")):
        DAMAGES[damage][0](tmp_path / f"step_{number:08d}")
    with pytest.raises(CheckpointError, match="no complete checkpoint in") as error:
        find_newest(tmp_path)
    assert "step_00000004: rank_00000.safetensors has 0 bytes" in str(error.value)
    assert "step_00000002: manifest unreadable" in str(error.value)
    assert find_newest(tmp_path / "nothing") is None


@pytest.mark.faults(row=4)
def test_the_newest_complete_checkpoint_is_found_whatever_lies_beside_it(tmp_path: Path) -> None:
    """No file points to it: incomplete, foreign and renamed entries are told apart."""
    save_steps(tmp_path, [2, 4, 6])
    (tmp_path / "step_00000006").rename(tmp_path / "step_00000009")  # says 9, holds 6
    (tmp_path / ".step_00000008.life_3.tmp").mkdir()
    (tmp_path / "step_00000007").mkdir()
    for name in ("step_old", "step_12", "step_00000010.bak", "global_step20", "latest"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000011").write_text("a file")
    newest = find_newest(tmp_path)
    assert newest is not None and newest.step == 4


@pytest.mark.faults(row=4)
def test_a_renamed_checkpoint_is_no_reason_to_start_from_scratch(tmp_path: Path) -> None:
    save_steps(tmp_path, [2])
    (tmp_path / "step_00000002").rename(tmp_path / "good_one")
    with pytest.raises(CheckpointError, match="under its own name, but good_one with a manifest"):
        find_newest(tmp_path)
    (tmp_path / "good_one").rename(tmp_path / "step_00000003")
    with pytest.raises(CheckpointError, match="is of step 2 by its manifest: was it renamed"):
        find_newest(tmp_path)
