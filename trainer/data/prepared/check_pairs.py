"""What should be known of preferences before training: how long the answers are, and margins."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table

from trainer.data.prepared.store import SourceStore

BAR_WIDTH = 24


def answer_lengths(source: SourceStore) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the learnt tokens of each document's chosen and rejected answer. -> [n], [n]

    A side that is not there has none.
    """
    if source.weights is None or source.first_lengths is None:
        raise TypeError(f"{source.name} holds {source.content}, not preferences")
    targets = np.concatenate([[0], np.cumsum(np.asarray(source.weights) > 0)])
    begins, ends = source.offsets[:-1], source.offsets[1:]
    middles = begins + source.first_lengths
    return targets[middles] - targets[begins], targets[ends] - targets[middles]


def describe_pairs(source: SourceStore) -> RenderableType:
    """Return the lengths of chosen and rejected answers as bars, and what they and margins say."""
    chosen, rejected = answer_lengths(source)
    is_pair = (chosen > 0) & (rejected > 0)
    lines = list(_lengths(chosen[is_pair], rejected[is_pair])) if is_pair.any() else []
    num_good, num_bad = (int((side[~is_pair] > 0).sum()) for side in (chosen, rejected))
    if num_good or num_bad:
        lines.append(f"lone answers: {num_good:,} desirable, {num_bad:,} undesirable")
    if source.margins is not None:
        lines += _margins(np.asarray(source.margins)[is_pair])
    return Group(_histogram(chosen, rejected), *lines)


def _lengths(chosen: NDArray[np.int64], rejected: NDArray[np.int64]) -> Iterator[str]:
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        median, most = (int(np.percentile(side, share)) for share in (50, 95))
        yield f"{name}: median {median:,} tokens, 95 % up to {most:,}, longest {side.max():,}"
    longer, equal = (chosen > rejected).mean(), (chosen == rejected).mean()
    yield f"the chosen answer is the longer one in {longer:.1%}, of equal length in {equal:.1%}"


def _margins(margins: NDArray[np.float32]) -> Iterator[str]:
    given = margins[margins != 0]
    if len(given):
        yield (
            f"margins: {len(given):,} pairs, median {np.median(given):g}, from {given.min():g} to "
            f"{given.max():g}; {int((given < 0).sum()):,} below 0"
        )


def _histogram(chosen: NDArray[np.int64], rejected: NDArray[np.int64]) -> Table:
    """Return answers by length in tokens, a bar each for the chosen and the rejected ones."""
    edges = 2 ** np.arange(0, 33, dtype=np.int64)
    present = [side[side > 0] for side in (chosen, rejected)]
    sides = [np.bincount(np.searchsorted(edges, side), minlength=33) for side in present]
    occurring = np.flatnonzero(sides[0] + sides[1])
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("answer", justify="right", no_wrap=True)
    for name in ("chosen", "rejected"):
        table.add_column(name, no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
    largest = max(side.max() for side in sides)
    for place in range(occurring[0], occurring[-1] + 1):
        cells: list[RenderableType] = [f"≤ {edges[place]:,}"]
        for side in sides:
            cells += [Bar(largest, 0, side[place], width=BAR_WIDTH), f"{side[place]:,}"]
        table.add_row(*cells)
    return table
