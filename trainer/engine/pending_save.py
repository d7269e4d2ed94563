"""One save under way on one rank: it writes its file; rank 0's commits when all have.

Threads use no collective: they meet in the draft's folder. What a thread could not do is kept for
the main one, which raises it on all ranks together.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from typing import Any

from trainer import heartbeat
from trainer.config import LoopConfig
from trainer.engine import checkpoint
from trainer.engine.checkpoint import Draft
from trainer.engine.rotation import rotate
from trainer.faults import reach

POLL_S = 0.05  # between looks for the other ranks' files
GROWTH_S = 0.5  # between looks whether this rank's file has grown
LEAVE_S = 10.0  # that a life which fails still waits for them


class PendingSave:
    """One save under way on this rank: first its own file, then, on rank 0, the commit."""

    def __init__(self, draft: Draft, loop: LoopConfig, write: Callable[[], dict[str, Any]]) -> None:
        self.draft = draft
        self.failure: Exception | None = None
        self.begun = time.monotonic()
        self.stall_s = self.seconds = 0.0
        self.num_bytes, self.is_reported, self._is_committed = 0, False, False
        self._loop, self._write = loop, write
        self._written, self._given_up = threading.Event(), threading.Event()
        self._patience = threading.Event()  # set: wait for others no longer than LEAVE_S
        self._thread: threading.Thread | None = None

    def start(self, on_failure: Callable[[], None]) -> None:
        """Write and commit in a thread."""

        def work() -> None:
            self.write()
            self.commit()
            self.delete_old()
            if self.failure is not None:
                on_failure()

        self._thread = threading.Thread(target=work, name="save", daemon=True)
        self._thread.start()

    def write(self) -> None:
        """Write this rank's file; a failure is kept for the main thread."""
        try:
            reach("save", rank=self.draft.rank, step=self.draft.step)
            facts = self._write()
            self.num_bytes = facts["bytes"]
            checkpoint.finish_shard(self.draft, facts)
        except Exception as error:
            self.failure = error
        finally:
            self._written.set()

    def commit(self) -> None:
        """Commit on rank 0 once all ranks have written."""
        try:
            if self.draft.rank == 0 and self.failure is None and self._all_written():
                checkpoint.commit(self.draft)
                self._is_committed = True
        except Exception as error:
            self.failure = error
        finally:
            self.seconds = time.monotonic() - self.begun

    def delete_old(self) -> None:
        """Delete on rank 0 what this commit made too old; training need not stand still for it."""
        if self._is_committed:
            rotate(self.draft.folder, self.draft.step, self._loop)

    def _all_written(self) -> bool:
        """Wait for the other ranks; return False if there is no hope for one."""
        limit = float("inf")
        while checkpoint.missing_ranks(self.draft):
            if self._patience.is_set() and limit == float("inf"):
                limit = time.monotonic() + LEAVE_S
            if self._given_up.wait(POLL_S) or time.monotonic() > limit:
                return False
        return True

    @property
    def is_done(self) -> bool:
        """Return whether this rank has done its part."""
        return self._thread is None or not self._thread.is_alive()

    def finish(self) -> None:
        """Wait for all ranks and raise on each what went wrong on any."""
        self._written.wait()
        try:
            checkpoint.raise_together(self.failure, self.draft)
        except BaseException:
            self._given_up.set()
            self._join()
            raise
        self._join()
        checkpoint.raise_together(self.failure, self.draft)

    def leave(self) -> None:
        """Let a life that ends with an error commit this save, if that can be; or delete it.

        What is left aside would take space that the next life needs before it can clear it. A beat
        tells the watchdogs of all ranks each time that the file has grown: else they would end this
        rank as a hung one, before it has said what its error was.
        """
        self._patience.set()
        with heartbeat.phase("leave"):
            size = 0
            while not self.is_done:
                self._join(GROWTH_S)
                if size < (size := self._written_bytes()):
                    heartbeat.beat()
        if self.draft.rank == 0 or self.failure is not None:
            shutil.rmtree(self.draft.aside, ignore_errors=True)

    def _written_bytes(self) -> int:
        """Return the length of this rank's file; 0 before it is there, or when it was committed."""
        try:
            return self.draft.shard.stat().st_size
        except FileNotFoundError:
            return 0

    def _join(self, limit_s: float | None = None) -> None:
        if self._thread is None:
            self.commit()
        else:
            self._thread.join(limit_s)
