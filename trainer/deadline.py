"""The job's time limit: nothing is begun that would not end, with a save, before it.

What steps, evaluations and saves take is measured as they happen, and kept in checkpoints for the
next life. Standard library only.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

Work = Literal["step", "evaluation", "save"]
WINDOW = 20  # durations remembered of each kind of work; the longest counts
MARGIN = 1.25  # of a measured duration: the next one may be longer
LEAVE_S = 15.0  # to close files, end the ranks and requeue the job
# Until a save was measured: two minutes, or a tenth of the job where that is less.
FIRST_SAVE_S = 120.0
FIRST_SAVE_SHARE = 0.1


def name_ranks(num_ranks: int, device: str) -> str:
    """Return on what durations were measured, as checkpoints note it."""
    return f"{num_ranks} x {device}"


class Deadline:
    """Compares the time left with what the next piece of work takes.

    Args:
        time_limit: when the job is ended, seconds since the epoch; None = never.
        clock: seconds since the epoch.
    """

    def __init__(
        self, time_limit: float | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self.time_limit, self._clock = time_limit, clock
        self._measured: dict[str, deque[float]] = {}
        left = 0.0 if time_limit is None else max(0.0, time_limit - clock())
        self._guess = min(FIRST_SAVE_S, FIRST_SAVE_SHARE * left)
        self._expected: dict[str, float] = {}
        self._save_begun: float | None = None  # of a save that goes on beside training

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Take over what an earlier life measured, until this one has figures of its own."""
        self._expected |= seconds

    @contextmanager
    def timed(self, work: Work) -> Iterator[None]:
        """Measure a piece of work."""
        start = self._clock()
        yield
        self._note(work, self._clock() - start)

    def begin_save(self) -> None:
        """Note that a save has begun, which may go on while training does."""
        self._save_begun = self._clock()

    def end_save(self, seconds: float) -> None:
        """Note that it is committed, and what it took from its beginning on."""
        self._save_begun = None
        self._note("save", seconds)

    def _note(self, work: Work, seconds: float) -> None:
        self._measured.setdefault(work, deque(maxlen=WINDOW)).append(seconds)

    def seconds(self, work: str) -> float:
        """Return what a piece of work takes: measured, or a guess for a save, or 0."""
        guess = self._guess if work == "save" else 0.0
        return max(self._measured.get(work, ()), default=self._expected.get(work, guess))

    def measured(self) -> dict[str, float]:
        """Return the seconds of every kind of work that this life or an earlier one measured."""
        return self._expected | {work: round(max(s), 3) for work, s in self._measured.items()}

    def shortage(self, work: Work = "save") -> str:
        """Return why ``work`` must not be begun any more, empty if there is time for it.

        A save, which is kept free at the end, may follow on anything else; before it, one that
        is under way has to end.
        """
        if self.time_limit is None:
            return ""
        seconds = {str(part): self.seconds(part) for part in (work, "save")}
        if self._save_begun is not None:
            elapsed = self._clock() - self._save_begun
            seconds["save"] = max(seconds["save"], elapsed)
            seconds["save under way"] = seconds["save"] - elapsed
        left = self.time_limit - self._clock()
        if left >= MARGIN * sum(seconds.values()) + LEAVE_S:
            return ""
        needs = " and ".join(f"{part} {taken:.1f} s" for part, taken in seconds.items())
        return f"the time limit ({max(left, 0.0):.0f} s left are too few for: {needs})"
