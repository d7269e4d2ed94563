"""Going back: what is written, and what a life that finds it does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer import loop
from trainer.engine.committed import Checkpoint
from trainer.errors import NumericsError, RollBackError
from trainer.roll_back import ROLL_BACKS_NAME, read_roll_backs, record_roll_back, redirect


def checkpoint(step: int, next_row: int, num_roll_backs: int = 0) -> Checkpoint:
    state: dict[str, Any] = {"loader": {"next_row": next_row}, "tokens": 5}
    if num_roll_backs:
        state["guard"] = {"num_roll_backs": num_roll_backs}
    return Checkpoint(Path(f"step_{step:08d}"), {"step": step, "state": state})


def go_back(run_dir: Path, failed: int, to: Checkpoint, limit: int = 2) -> None:
    record_roll_back(RollBackError("loss leaps", failed), to, run_dir, 0, 8, limit)


def test_data_goes_on_behind_the_step_that_failed(tmp_path: Path) -> None:
    last = checkpoint(4, 32)
    assert redirect(last, tmp_path, 0) is last and redirect(None, tmp_path, 0) is None
    go_back(tmp_path, 6, last)  # the 7th step: rows 48 to 55
    found = redirect(last, tmp_path, 0)
    assert found is not None and last.state["loader"] == {"next_row": 32}
    assert found.state["loader"] == {"next_row": 56} and found.state["tokens"] == 5
    assert found.state["guard"] == {"num_roll_backs": 1}
    [made] = read_roll_backs(tmp_path)
    assert (made.failed_step, made.to_step, made.reason) == (7, 4, "loss leaps")


def test_a_second_roll_back_starts_where_the_first_one_went(tmp_path: Path) -> None:
    last = checkpoint(4, 32)
    go_back(tmp_path, 6, last)
    again = redirect(last, tmp_path, 0)
    assert again is not None
    go_back(tmp_path, 4, again)
    found = redirect(last, tmp_path, 0)
    assert found is not None and found.state["loader"] == {"next_row": 64}


class Nothing:
    """A stage's bag, and its sinks, that take what they are told."""

    def rows_per_step(self, config: Any) -> int:
        return 8

    def forget(self) -> None: ...
    def rewind(self, step: int) -> None: ...
    def event(self, step: int, name: str, **fields: Any) -> None: ...


def test_a_run_that_goes_back_twice_never_reads_the_first_bad_step_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both times to one checkpoint: rows 48 to 55 are bad, then those of the step after them."""
    monkeypatch.setattr(loop, "find_newest", lambda folder, damaged: checkpoint(4, 32))
    stage: Any = Nothing()
    stage.bag = stage
    config = SimpleNamespace(
        loop=SimpleNamespace(damaged="refuse"), guard=SimpleNamespace(max_roll_backs=3)
    )
    context: Any = SimpleNamespace(config=config, run_dir=tmp_path, rank=0)
    rows = []
    for failed in (6, 4, 5):
        found = loop.roll_back(stage, context, stage, RollBackError("loss leaps", failed))
        assert found is not None
        rows.append(found.state["loader"]["next_row"])
        again = redirect(checkpoint(4, 32), tmp_path, 0)  # as a new life does
        assert again is not None and again.state == found.state
    assert rows == [56, 64, 80]
    assert found.state["guard"] == {"num_roll_backs": 3}


def test_later_checkpoints_know_already(tmp_path: Path) -> None:
    go_back(tmp_path, 6, checkpoint(4, 32))
    for later in (checkpoint(4, 56, 1), checkpoint(8, 88, 1), checkpoint(2, 16)):
        assert redirect(later, tmp_path, 0) is later


def test_there_are_only_so_many(tmp_path: Path) -> None:
    last = checkpoint(4, 32)
    with pytest.raises(NumericsError, match="no checkpoint to roll back to"):
        record_roll_back(RollBackError("loss leaps", 1), None, tmp_path, 0, 8, 2)
    go_back(tmp_path, 6, last)
    go_back(tmp_path, 6, last)
    with pytest.raises(NumericsError, match=r"loss leaps \(guard.max_roll_backs=2 are used up\)"):
        go_back(tmp_path, 6, last)
    assert len(read_roll_backs(tmp_path)) == 2


def test_a_torn_line_was_never_acted_on(tmp_path: Path) -> None:
    last = checkpoint(4, 32)
    (tmp_path / ROLL_BACKS_NAME).write_bytes('{"time": "黑'.encode()[:-1])
    assert redirect(last, tmp_path, 0) is last
    go_back(tmp_path, 6, last)
    found = redirect(last, tmp_path, 0)
    assert found is not None and found.state["loader"] == {"next_row": 56}
