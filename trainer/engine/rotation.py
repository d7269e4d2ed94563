"""Which checkpoints are kept: by number, by multiples of steps, by bytes. Only after a commit."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from trainer.config import LoopConfig
from trainer.engine.manifest import list_steps

LOG = logging.getLogger(__name__)


def rotate(folder: Path, committed: int, loop: LoopConfig) -> list[Path]:
    """Delete old checkpoints on rank 0 after the commit of a step; return what was deleted.

    The newest ``keep_last`` stay, and those whose step is a multiple of ``keep_every`` (0 = none).
    Where ``keep_gb`` is set, what stays leaves room in it for the next checkpoint: the oldest goes
    first, those of ``keep_every`` last. The newest is never deleted.
    Checkpoints beyond ``committed`` are the damaged ones that this life walked back over.
    What cannot be looked at or deleted now is no reason to stop a run: the next commit tries again.
    """
    try:
        deleted = _too_old(folder, committed, loop)
    except OSError as error:
        LOG.warning("old checkpoints in %s could not be looked at: %s", folder, error)
        return []
    for path in (*deleted, *folder.glob(".step_*.tmp")):
        _remove(path)
    return deleted


def _too_old(folder: Path, committed: int, loop: LoopConfig) -> list[Path]:
    steps = {path: int(path.name.removeprefix("step_")) for path in list_steps(folder)}
    ahead = [path for path, step in steps.items() if step > committed]
    done = [path for path, step in steps.items() if step <= committed]
    milestones = [p for p in done if loop.keep_every and steps[p] % loop.keep_every == 0]
    kept = [p for p in done if p in done[: loop.keep_last] or p in milestones]
    if loop.keep_gb is not None:
        kept = _within(kept, milestones, loop.keep_gb * 1e9)
    return ahead + [path for path in done if path not in kept]


def _within(kept: list[Path], milestones: list[Path], budget: float) -> list[Path]:
    """Return which of ``kept``, newest first, fit into a budget together with one more."""
    sizes = {path: folder_bytes(path) for path in kept}
    newest, *others = kept
    # In the order in which they go: plain before milestones, old before new.
    for path in sorted(others, key=lambda p: (p in milestones, p.name)):
        if sum(sizes.values()) + sizes[newest] <= budget:
            break
        del sizes[path]
    return list(sizes)


def folder_bytes(path: Path) -> int:
    """Return the bytes of the files in a folder."""
    return sum(file.stat().st_size for file in path.iterdir())


def _remove(path: Path) -> None:
    """Delete a folder, or say that it could not be deleted."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        LOG.warning("old checkpoint %s could not be deleted: %s", path, error)
