"""Stop requests, on which all ranks agree at a step boundary: signals, RUN/stop, the time limit."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from trainer.deadline import Deadline, Work
from trainer.engine.collectives import any_over_ranks
from trainer.errors import STOP_FILE_CAUSE, StopRequestedError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
POLL_S = 1.0  # between looks for the file


class StopRequest:
    """Why this rank should stop, if it should; what that means is decided by all ranks together.

    Args:
        stop_file: a file that asks for a stop; of rank 0 only, like a deadline with a limit.
        deadline: when the job ends.
    """

    def __init__(self, stop_file: Path | None = None, deadline: Deadline | None = None) -> None:
        self.cause, self.deadline = "", deadline or Deadline()
        self._stop_file, self._polled_at = stop_file, float("-inf")

    @property
    def requested(self) -> bool:
        """Return whether this rank was told to stop, or is left with just the time for a save."""
        return self._is_due("save")

    def agreed(self, work: Work) -> bool:
        """Return whether any rank was told to stop, or has no time to begin ``work``.

        Every rank must call this. What was once agreed on stays so.
        """
        return any_over_ranks(self._is_due(work))

    def honoured(self, step: int) -> StopRequestedError:
        """Return the error that ends a run which has saved ``step``; the stop file has done."""
        if self.cause == STOP_FILE_CAUSE and self._stop_file is not None:
            self._stop_file.unlink(missing_ok=True)
        return StopRequestedError(step, self.cause)

    def ask(self, cause: str) -> None:
        """Ask for a stop; also from another thread, whose failure the main one will raise."""
        self.cause = self.cause or cause

    def _is_due(self, work: Work) -> bool:
        if not self.cause:
            self.cause = self._look_for_file() or self.deadline.shortage(work)
        return bool(self.cause)

    def _look_for_file(self) -> str:
        now = time.monotonic()
        if self._stop_file is None or now - self._polled_at < POLL_S:
            return ""
        self._polled_at = now
        return STOP_FILE_CAUSE if self._stop_file.exists() else ""

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the stop signals inside the block and restore the former handlers after it."""
        former = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
