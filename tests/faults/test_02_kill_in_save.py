"""A kill at any byte of a save leaves the checkpoint before it, and nothing that stays."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from tiny_engine import Countdown, TinyEngine, loaded_weights, save, save_steps

from trainer.config import LoopConfig
from trainer.engine.manifest import list_leftovers, list_steps
from trainer.engine.saver import Saver

pytestmark = pytest.mark.faults(row=2)
NUM_DRAWS = 30  # of each way to save
NUM_CHANGES = 9  # at least, of a save: calls that are no write, each a place to die at


def in_child(work: Callable[[], None]) -> int:
    """Do something in a process of its own, without new imports; return what it ended with."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        torch.set_num_threads(1)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def save_step_two(folder: Path, countdown: Countdown, **loop: Any) -> None:
    engine = TinyEngine()
    engine.step()
    engine.step()
    countdown.install()
    save(engine, folder, 2, **loop)


@pytest.mark.parametrize("way", ["asynchronous", "blocking", "staged"])
def test_a_kill_at_any_byte_of_a_save_leaves_the_checkpoint_before_it(
    tmp_path: Path, way: str
) -> None:
    loop = {"save_async": way != "blocking"}
    loop |= {"staging_dir": str(tmp_path / "disk")} if way == "staged" else {}
    counts = tmp_path / "counts"

    def count() -> None:
        save_steps(tmp_path / "whole", [1], **loop)
        save_step_two(tmp_path / "whole", countdown := Countdown(), **loop)
        counts.write_text(str(countdown.done))

    assert in_child(count) == 0
    total, random = int(counts.read_text()), Random(way)
    assert total > 36_000 + NUM_CHANGES
    folder = tmp_path / "checkpoints"
    weights = save_steps(folder, [1], **loop)
    num_bytes = [random.randrange(total) for _ in range(NUM_DRAWS - 10)]
    # The last changes are the manifest, the renames and the syncs: a place to die at each.
    last = random.sample(range(total - 700, total), 10)
    seen = set()
    for at in num_bytes + last:
        code = in_child(lambda: save_step_two(folder, Countdown(at), **loop))  # noqa: B023
        assert code == -signal.SIGKILL
        step, loaded = loaded_weights(folder)
        seen.add(step)
        if step == 1:
            assert all(torch.equal(loaded[name], weights[1][name]) for name in loaded)
        else:  # the kill came after the rename: the new one counts and is whole
            assert step == 2 and list_steps(folder)[1:] == [folder / "step_00000001"]
            for path in list_steps(folder)[0].iterdir():
                path.unlink()
            list_steps(folder)[0].rmdir()
    assert 1 in seen
    with Saver(TinyEngine(), folder, LoopConfig(**loop)):  # what the next life begins with
        assert list_leftovers(folder) == []
    assert not list((tmp_path / "disk").glob("*/*"))
