"""Old checkpoints are deleted after a commit, beside training."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tiny_engine import TinyEngine

from trainer.config import LoopConfig
from trainer.engine import rotation
from trainer.engine.manifest import list_steps
from trainer.engine.saver import Saver


def test_old_checkpoints_go_while_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it stands still until the new one counts; the next save waits for the room."""
    go, remove = threading.Event(), rotation._remove

    def remove_late(path: Path) -> None:
        assert go.wait(30)
        remove(path)

    monkeypatch.setattr(rotation, "_remove", remove_late)
    engine = TinyEngine()
    engine.step()
    with Saver(engine, tmp_path, LoopConfig(save_async=False, keep_last=1)) as saver:  # type: ignore[arg-type]
        saver.begin(1, {})
        saver.begin(2, {})
        assert [path.name for path in list_steps(tmp_path)] == ["step_00000002", "step_00000001"]
        go.set()
        saver.begin(3, {})
    assert [path.name for path in list_steps(tmp_path)] == ["step_00000003"]
