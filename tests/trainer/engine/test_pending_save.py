"""A rank that fails while it saves ends with its own error, not as one that hangs."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from trainer import heartbeat
from trainer.config import LoopConfig
from trainer.engine import pending_save
from trainer.engine.checkpoint import Draft, begin
from trainer.engine.manifest import list_steps
from trainer.engine.pending_save import PendingSave


@pytest.mark.parametrize("growing", [True, False], ids=["a slow disk", "a hung disk"])
def test_a_rank_that_leaves_beats_while_its_file_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, growing: bool
) -> None:
    """A write that stands still must not: its watchdog has to end it some day."""
    draft = Draft(tmp_path, 0, {"step": 1, "world_size": 1})
    begin(draft, "")
    looked, sizes, ages = threading.Condition(), list[int](), set[float]()

    def seen(size: int) -> bool:
        return sizes.count(size) == 4

    def write() -> dict[str, Any]:
        with draft.shard.open("wb", buffering=0) as file, looked:
            for size in (1, 2, 3) if growing else (1,):
                file.write(b"1")
                assert looked.wait_for(partial(seen, size), 30)
        return {"bytes": 1, "sha256": ""}

    pending = PendingSave(draft, LoopConfig(), write)
    written_bytes = pending._written_bytes

    def look() -> int:
        assert heartbeat.pulse().phase == "leave"
        ages.add(heartbeat.pulse().at)
        with looked:
            sizes.append(written_bytes())
            looked.notify()
        return sizes[-1]

    monkeypatch.setattr(pending_save, "GROWTH_S", 0.01)
    monkeypatch.setattr(pending, "_written_bytes", look)
    pending.start(lambda: None)
    pending.leave()
    assert (len(ages) > 2) == growing
    assert [path.name for path in list_steps(tmp_path)] == ["step_00000001"]  # and it was saved
