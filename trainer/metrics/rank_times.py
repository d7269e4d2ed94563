"""Who holds the others up: each rank's own time in a step, and how the slowest compares.

Only what a rank does before it waits for others counts: loading its data, its forwards, its
rollouts. On CUDA the forwards are measured by events, which are read when the figures are logged
and the device has been waited for anyway: nothing here synchronises it. Under ZeRO-3 forwards wait
for each other, so that there only data and rollouts tell the ranks apart.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median_low
from typing import Any, Literal

import torch

Part = Literal["data", "compute"]
MAX_SLOWEST = 8  # ranks recorded one by one


@dataclass(frozen=True)
class Comparison:
    """The ranks' own seconds a step.

    Attributes:
        median_s: of all ranks.
        ranks: the slowest ones, slowest first: ``rank``, ``host``, ``seconds`` and, of them,
            ``data_seconds``.
    """

    median_s: float
    ranks: list[dict[str, Any]]

    def figures(self) -> dict[str, float]:
        """Return the slowest rank, and how many seconds a step it takes more than the median."""
        first = self.ranks[0]
        delay_s = float(first["seconds"]) - self.median_s
        return {"slowest_rank": first["rank"], "slowest_rank_delay_s": delay_s}


def compare(times: Sequence[Sequence[float]], hosts: Sequence[str]) -> Comparison:
    """Return who is slowest.

    Args:
        times: by rank, seconds a step of loading data and of computing.
        hosts: by rank.
    """
    rows: list[dict[str, Any]] = [
        {"rank": rank, "host": host, "seconds": sum(own), "data_seconds": own[0]}
        for rank, (own, host) in enumerate(zip(times, hosts, strict=True))
    ]
    slowest = sorted(rows, key=lambda row: -row["seconds"])[:MAX_SLOWEST]
    # Of two ranks the slower one must not count towards what it is compared with.
    return Comparison(median_low(row["seconds"] for row in rows), slowest)


class RankTimes:
    """Seconds that this rank has spent by itself since they were read last.

    Args:
        device: that computes.
        world_size: number of ranks; a lone one has nobody to be compared with.
    """

    def __init__(self, device: torch.device, world_size: int) -> None:
        self._on_cuda, self._world_size = device.type == "cuda", world_size
        self._seconds: dict[Part, float] = {"data": 0.0, "compute": 0.0}
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._hosts: list[str] = []  # by rank, once they are asked for
        self.num_steps = 0  # since the last reading
        self.is_paused = False  # what goes on belongs to no step

    @contextmanager
    def timed(self, part: Part, on_device: bool = False) -> Iterator[None]:
        """Count the block; ``on_device``: what it starts there, not how long the host takes."""
        if self._world_size == 1 or self.is_paused:
            yield
        elif on_device and self._on_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            start = time.perf_counter()
            yield
            self._seconds[part] += time.perf_counter() - start

    def read(
        self,
        gather_texts: Callable[[str], list[str]],
        gather_figures: Callable[[Sequence[float]], list[list[float]]],
    ) -> Comparison | None:
        """Compare the ranks and start anew; None for a lone rank. Every rank calls this.

        The device must have finished the steps.

        Args:
            gather_texts: returns every rank's text; called once.
            gather_figures: returns every rank's numbers.
        """
        if self._world_size == 1:
            return None
        self._hosts = self._hosts or gather_texts(socket.gethostname())
        return compare(gather_figures(self._drain()), self._hosts)

    def _drain(self) -> list[float]:
        """Return seconds a step of loading data and of computing, and start anew."""
        self._seconds["compute"] += sum(a.elapsed_time(b) for a, b in self._events) / 1e3
        found = [seconds / max(1, self.num_steps) for seconds in self._seconds.values()]
        self._seconds, self._events = dict.fromkeys(self._seconds, 0.0), []
        self.num_steps = 0
        return found
