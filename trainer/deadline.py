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

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Take over what an earlier life measured, until this one has figures of its own."""
        self._expected |= seconds

    @contextmanager
    def timed(self, work: Work) -> Iterator[None]:
        """Measure a piece of work."""
        start = self._clock()
        yield
        self._measured.setdefault(work, deque(maxlen=WINDOW)).append(self._clock() - start)

    def seconds(self, work: str) -> float:
        """Return what a piece of work takes: measured, or a guess for a save, or 0."""
        guess = self._guess if work == "save" else 0.0
        return max(self._measured.get(work, ()), default=self._expected.get(work, guess))

    def measured(self) -> dict[str, float]:
        """Return the seconds of every kind of work that this life or an earlier one measured."""
        return self._expected | {work: round(max(s), 3) for work, s in self._measured.items()}

    def shortage(self, work: Work = "save") -> str:
        """Return why ``work`` must not be begun any more, empty if there is time for it.

        A save, which is kept free at the end, may follow on anything else.
        """
        if self.time_limit is None:
            return ""
        parts = dict.fromkeys((work, "save"))
        seconds = {part: self.seconds(part) for part in parts}
        left = self.time_limit - self._clock()
        if left >= MARGIN * sum(seconds.values()) + LEAVE_S:
            return ""
        needs = " and ".join(f"{part} {taken:.1f} s" for part, taken in seconds.items())
        return f"the time limit ({max(left, 0.0):.0f} s left are too few for: {needs})"
