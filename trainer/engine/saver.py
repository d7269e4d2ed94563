"""When and how checkpoints are saved: copied at once, written by a thread while training goes on.

The ranks copy their fragments to host memory, or into files on a node-local disk, and go on. A
thread of each writes its file (``pending_save.py``). What a thread could not do is a reason to
stop, on which ranks agree at the next step, and is raised by ``wait`` on all of them.
"""

from __future__ import annotations

import errno
import logging
import math
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from trainer.config import LoopConfig
from trainer.engine import checkpoint
from trainer.engine.checkpoint import BYTES_PER_WEIGHT, Draft, iterate_tensors
from trainer.engine.grouping import num_weights
from trainer.engine.host_copy import HostCopy, fits_beside_others
from trainer.engine.pending_save import PendingSave
from trainer.engine.shard_file import Layout, copy_durably, write_shard
from trainer.engine.staging import Staging
from trainer.errors import ConfigError
from trainer.lease import Lease
from trainer.lives import cut_saves

if TYPE_CHECKING:
    from trainer.engine.engine import Engine

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint.

    Attributes:
        step: optimizer steps done.
        path: of its folder.
        stall_s: that training stood still for it.
        seconds: from its beginning to its commit.
        num_bytes: of this rank's shard.
    """

    step: int
    path: Path
    stall_s: float
    seconds: float
    num_bytes: int


class Saver:
    """Saves an engine's checkpoints, one at a time; every rank makes the same calls.

    Args:
        engine: the trained engine.
        folder: the run's ``checkpoints`` folder.
        loop: how to save, and what to keep.
        lease: the right to write there; None where nobody else can.
        on_failure: called by the thread that could not save, for ranks to agree on at a step.
        report: called with each committed checkpoint, by the main thread.

    Raises:
        ConfigError: a new checkpoint has no place beside the last one within ``loop.keep_gb``.
        StorageError: ``loop.staging_dir`` cannot be written.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        loop: LoopConfig,
        lease: Lease | None = None,
        *,
        on_failure: Callable[[], None] = lambda: None,
        report: Callable[[Saved], None] = lambda saved: None,
    ) -> None:
        self._engine, self._folder, self._loop, self._lease = engine, folder, loop, lease
        self._on_failure, self._report = on_failure, report
        self._pending: PendingSave | None = None
        self._deleter = ThreadPoolExecutor(1, "delete")
        self._deleted: Future[None] = self._deleter.submit(lambda: None)
        self._layout: Layout | None = None
        self._staging: Staging | None = None
        if engine.rank == 0:
            clear_cut_saves(folder)
        trained = sum(num_weights(param) for param in engine.trainable().values())
        refuse_tight_budget(BYTES_PER_WEIGHT * trained, loop)
        if loop.staging_dir is not None:
            self._staging = Staging(loop.staging_dir, folder, lease, engine.rank)
        self._share_bytes = BYTES_PER_WEIGHT * trained // engine.world_size
        self._copy: HostCopy | None = None
        self._is_background: bool | None = None  # None: the first save finds out

    def begin(self, step: int, state: dict[str, Any], stop: str = "") -> None:
        """Save the engine as it is now; returns as soon as it may change.

        Args:
            step: optimizer steps done.
            state: what else resumes (JSON-able; rank 0's is written).
            stop: what asked for a save at the end of this life, empty otherwise.

        Raises:
            StorageError: this save, or the one before it, was not written on some rank.
            LeaseError: a newer life owns the folder.
        """
        asked = time.monotonic()
        self.wait()
        begun = time.monotonic()
        draft = checkpoint.draft_checkpoint(self._engine, self._folder, step, state, self._lease)
        self._deleted.result()  # what the last save made too old may be room for this one
        checkpoint.together(lambda: checkpoint.begin(draft, stop), draft)
        background = self._writes_in_background()
        pending = PendingSave(draft, self._loop, self._prepare(draft, background))
        pending.begun, self._pending = begun, pending
        if background:
            pending.start(self._on_failure)
            pending.stall_s = time.monotonic() - asked
        else:
            pending.write()
            self.wait()
            self._deleted = self._deleter.submit(pending.delete_old)

    def poll(self) -> None:
        """Report a save that was committed meanwhile; costs nothing, and waits for nobody.

        A save that failed is left to ``wait``, as is one of which this rank cannot know.
        """
        pending = self._pending
        if pending is None or pending.is_reported or not pending.is_done or pending.failure:
            return
        pending.is_reported = True
        if not pending.stall_s:
            pending.stall_s = pending.seconds
        draft = pending.draft
        self._report(
            Saved(draft.step, draft.final, pending.stall_s, pending.seconds, pending.num_bytes)
        )

    def wait(self) -> None:
        """Wait until the pending save, if there is one, is committed.

        Raises:
            StorageError: it was not written on some rank.
            LeaseError: a newer life owns the folder.
        """
        pending = self._pending
        if pending is None:
            return
        try:
            pending.finish()
            self.poll()
        finally:
            self._pending = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Commit what is pending; after an error as far as that goes without the other ranks."""
        try:
            if error is None:
                self.wait()
                self._deleted.result()
            elif self._pending is not None:
                self._pending.leave()
                if self._pending.failure is not None:
                    LOG.warning("the save under way failed as well: %s", self._pending.failure)
        finally:
            self._deleter.shutdown()
            if self._staging is not None:
                self._staging.close()

    def _writes_in_background(self) -> bool:
        if self._is_background is None:
            self._is_background = self._staging is not None or self._copy_fits()
        return self._is_background

    def _copy_fits(self) -> bool:
        if not self._loop.save_async:
            return False
        problem = fits_beside_others(self._share_bytes)
        if problem and self._engine.rank == 0:
            LOG.warning(
                "loop.save_async=true, but a copy of what a checkpoint holds would take too much "
                "host memory (%s): training stands still while checkpoints are written. "
                "loop.staging_dir on a node-local disk, or more ranks, would spare that",
                problem,
            )
        return not problem

    def _prepare(self, draft: Draft, background: bool) -> Callable[[], dict[str, Any]]:
        """Copy what is saved to where training does not change it; return what writes it."""
        if not background:
            return lambda: self._stream_to(draft.shard)
        if self._staging is None:
            return self._copy_to_host(draft)
        staged = self._staging.shard
        facts: dict[str, Any] = {}
        checkpoint.together(lambda: facts.update(self._stream_to(staged, sync=False)), draft)
        return lambda: copy_verified(staged, draft.shard, facts)

    def _copy_to_host(self, draft: Draft) -> Callable[[], dict[str, Any]]:
        if self._copy is None:
            self._copy = HostCopy(pinned=self._engine.device.type == "cuda")
        copy = self._copy
        copy.take(iterate_tensors(self._engine))
        return lambda: write_shard(draft.shard, copy.layout, copy.tensors())

    def _stream_to(self, path: Path, sync: bool = True) -> dict[str, Any]:
        """Write this rank's tensors one at a time, without a copy of them all."""
        if self._layout is None:  # a pass of its own: offloaded tensors are here one at a time
            self._layout = [(key, view.numel()) for key, view in iterate_tensors(self._engine)]
        tensors = (view.detach().cpu() for _, view in iterate_tensors(self._engine))
        return write_shard(path, self._layout, tensors, sync=sync)


def clear_cut_saves(folder: Path) -> None:
    """Say which saves of earlier lives were cut off, and delete what they left."""
    for save in cut_saves(folder.parent):
        LOG.warning("%s", save)
    for leftover in folder.glob(".step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def copy_verified(staged: Path, shard: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Copy a staged file, check that it is still what was written, and delete it.

    Raises:
        OSError: it is not, or could not be copied.
    """
    if copy_durably(staged, shard) != facts:
        raise OSError(errno.EIO, "the staged file is not what was written there", str(staged))
    staged.unlink()
    return facts


def refuse_tight_budget(checkpoint_bytes: int, loop: LoopConfig) -> None:
    """Raise if ``loop.keep_gb`` has no place for a new checkpoint beside the last one."""
    if loop.keep_gb is None or 2 * checkpoint_bytes <= loop.keep_gb * 1e9:
        return
    raise ConfigError(
        f"loop.keep_gb={loop.keep_gb:g} cannot hold two checkpoints of "
        f"{checkpoint_bytes / 1e9:.3g} GB each ({BYTES_PER_WEIGHT} bytes per trained parameter), "
        "but the last one is deleted only when the next is there; use loop.keep_gb="
        f"{math.ceil(2 * checkpoint_bytes / 1e7 + 1) / 100:g} or more, train fewer parameters "
        "(peft=lora), or leave it null"
    )
