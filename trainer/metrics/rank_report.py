"""The report's table of the ranks that held the others up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from trainer.metrics.history import Record

COLUMNS = (
    "rank",
    "host",
    "records in which it was the slowest",
    "seconds a step by itself",
    "of them for data",
    "more than the median rank",
)
MAX_ROWS = 8


def tabulate_ranks(records: Sequence[Record]) -> list[list[Any]]:
    """Return rows of ``COLUMNS``: the ranks that were slowest most often first.

    Means are over the records that name the rank, which are those in which it was a slow one.

    Args:
        records: comparisons of the ranks, as ``Sinks.ranks`` writes them.
    """
    found: dict[tuple[int, str], list[tuple[float, float, float]]] = defaultdict(list)
    num_slowest: dict[tuple[int, str], int] = defaultdict(int)
    for record in records:
        for place, row in enumerate(record["slowest"]):
            key = row["rank"], row["host"]
            more = row["seconds"] - record["median_s"]
            found[key].append((row["seconds"], row["data_seconds"], more))
            num_slowest[key] += place == 0
    ranks = sorted(found, key=lambda key: (-num_slowest[key], key))[:MAX_ROWS]
    return [
        [
            *key,
            num_slowest[key],
            *(round(fmean(column), 4) for column in zip(*found[key], strict=True)),
        ]
        for key in ranks
    ]
