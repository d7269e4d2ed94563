"""Which source each row of a run comes from, in closed form.

Row i falls on the point ``(i * golden ratio + offset) mod 1``; the unit interval is divided among
the sources by weight. These points are as evenly spread as points can be (Knuth, TAOCP vol. 3,
section 6.4, theorem S), so every stretch of rows holds every source in proportion, and the number
of points in an interval has a closed form: any row can be found without walking to it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from trainer.errors import DataError

CIRCLE = 1 << 64  # the unit interval in integers, so that nothing is ever rounded
GOLDEN_STEP = 0x9E3779B97F4A7C15  # odd integer nearest to CIRCLE / golden ratio


class Mixture:
    """Deterministic weighted choice of a source for every row.

    Args:
        weights: relative share of rows of each source, or of passes over it; 0 is never drawn.
        rows_per_epoch: rows of one pass over each source.
        seed: moves the sequence along the circle.
        by_pass: weights count passes: each source's rows are drawn ``weight`` times as often.

    Raises:
        DataError: no source has a weight above 0, or one that has holds no training row.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        rows_per_epoch: Mapping[str, int],
        seed: int,
        by_pass: bool = False,
    ) -> None:
        self.names = list(weights)
        self.rows_per_epoch = dict(rows_per_epoch)
        if not any(weight > 0 for weight in weights.values()):
            raise DataError(
                f"data.sources: no weight above 0 in {dict(weights)}; give one source a weight"
            )
        for name, weight in weights.items():
            if weight > 0 and not rows_per_epoch[name]:
                raise DataError(
                    f"data.sources.{name}.weight={weight:g}, but no document of it is left for "
                    "training; lower its holdout_share or set its weight to 0"
                )
        shares = [w * rows_per_epoch[name] if by_pass else w for name, w in weights.items()]
        # A pass is what the weights ask for; where they are shares, each drawn source's rows once.
        drawn = [rows_per_epoch[name] for name, weight in weights.items() if weight > 0]
        self.rows_per_pass = sum(shares) if by_pass else float(sum(drawn))
        sums = np.cumsum([0.0, *shares])
        digest = hashlib.blake2b(f"mixture/{seed}".encode(), digest_size=8).digest()
        self._offset = int.from_bytes(digest, "little")
        self._edges = [round(float(share) * CIRCLE) for share in sums / sums[-1]]

    def num_steps(self, passes: float, rows_per_step: int) -> int:
        """Return the optimizer steps that ``passes`` over the data take, the last one whole."""
        return max(1, math.ceil(round(passes * self.rows_per_pass / rows_per_step, 9)))

    def counts_at(self, row: int) -> list[int]:
        """Return how many of the rows before ``row`` come from each source."""
        below = [self._count_below(edge, row) for edge in self._edges]
        return [after - before for before, after in pairwise(below)]

    def _count_below(self, edge: int, num_rows: int) -> int:
        """Count i < num_rows with (i * GOLDEN_STEP + offset) mod CIRCLE < edge."""
        # [x mod m < e] = floor((x + m) / m) - floor((x + m - e) / m)
        whole = floor_sum(num_rows, CIRCLE, GOLDEN_STEP, self._offset + CIRCLE)
        return whole - floor_sum(num_rows, CIRCLE, GOLDEN_STEP, self._offset + CIRCLE - edge)

    def draw(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return source index and row within that source's endless stream for rows start..stop-1.

        Returns:
            source_ids ``[stop - start]``, source_rows ``[stop - start]``.
        """
        # Unsigned 64-bit arithmetic wraps around at CIRCLE: just the modulus wanted.
        rows = np.arange(start, stop, dtype=np.uint64)
        points = rows * np.uint64(GOLDEN_STEP) + np.uint64(self._offset)
        inner_edges = np.array(self._edges[1:-1], dtype=object)
        # A trailing source of weight 0 has its edge at CIRCLE itself, one beyond uint64.
        inside = np.array([edge - 1 for edge in inner_edges if edge > 0], dtype=np.uint64)
        source_ids = np.searchsorted(inside, points, side="left").astype(np.int64)
        source_ids += sum(1 for edge in inner_edges if edge == 0)
        source_rows = np.empty_like(source_ids)
        for index, count in enumerate(self.counts_at(start)):
            mine = source_ids == index
            source_rows[mine] = count + np.arange(mine.sum())
        return source_ids, source_rows

    def epochs_at(self, num_rows: int) -> dict[str, float]:
        """Return how many times each source has been passed over after ``num_rows`` rows."""
        counts = zip(self.names, self.counts_at(num_rows), strict=True)
        return {name: count / max(1, self.rows_per_epoch[name]) for name, count in counts}


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Return the sum of ``(a * i + b) // m`` for i in 0..n-1, in O(log m) steps.

    The lattice-point count under a line, by Euclid's algorithm (Graham, Knuth & Patashnik,
    Concrete Mathematics, section 3.5).
    """
    total = 0
    while True:
        total += (n - 1) * n // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        if top < m:
            return total
        n, b, m, a = top // m, top % m, a, m
