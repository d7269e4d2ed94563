"""Whole documents into bins of one row each, without cutting any.

Best-fit decreasing: the longest document first, each into the fullest bin that has room for it
(Johnson 1974, doi:10.1137/0203025). Bins with equal room are interchangeable and documents of equal
length too, so both are dealt in groups, as packing by histogram does (Krell et al.,
arXiv:2107.02027): the work grows with the number of different lengths, not of documents.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Bins:
    """Places in the order of decreasing length, bin by bin.

    Attributes:
        places: ``[n]``; 0 stands for the longest document. Within a bin the longest come first.
        ends: ``[num_bins]`` where each bin ends in ``places``.
    """

    places: NDArray[np.int64]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Return the places in one bin."""
        return self.places[self.ends[index - 1] if index else 0 : self.ends[index]]


class _Rooms:
    """Open bins by the room that is left in them."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._sizes: list[int] = []  # ascending, those that some bin has left
        self._bins: dict[int, list[NDArray[np.int64]]] = {}
        self.num_bins = 0

    def take(self, length: int, count: int) -> tuple[int, NDArray[np.int64]]:
        """Return the smallest room of ``length`` or more and its bins; open new ones if none is.

        Args:
            length: of the documents to place.
            count: how many there are; no more new bins than they need are opened.
        """
        at = bisect_left(self._sizes, length)
        if at < len(self._sizes):
            room = self._sizes.pop(at)
            return room, np.concatenate(self._bins.pop(room))
        first = self.num_bins
        self.num_bins += -(-count // (self._capacity // length))
        return self._capacity, np.arange(first, self.num_bins)

    def put(self, room: int, bins: NDArray[np.int64]) -> None:
        """Give bins back that have ``room`` left."""
        if not len(bins) or not room:
            return
        if room not in self._bins:
            insort(self._sizes, room)
            self._bins[room] = []
        self._bins[room].append(bins)


def fill_bins(lengths: NDArray[np.int64], capacity: int) -> Bins:
    """Deal documents to bins.

    Args:
        lengths: ``[n]`` in tokens, in any order; 1 to ``capacity`` each.
        capacity: tokens a bin holds.
    """
    counts = np.bincount(lengths, minlength=capacity + 1)
    bin_of = np.empty(len(lengths), np.int64)
    rooms, at = _Rooms(capacity), 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        end = at + int(counts[length])
        while at < end:
            room, bins = rooms.take(length, end - at)
            each = room // length  # a bin that took one document is the fullest with room again
            num_full = min(len(bins), (end - at) // each)
            bin_of[at : at + num_full * each] = np.repeat(bins[:num_full], each)
            rooms.put(room - each * length, bins[:num_full])
            at, bins = at + num_full * each, bins[num_full:]
            if at < end and len(bins):
                bin_of[at:end] = bins[0]
                rooms.put(room - (end - at) * length, bins[:1])
                at, bins = end, bins[1:]
            rooms.put(room, bins)
    places = np.argsort(bin_of, kind="stable")
    return Bins(places, np.cumsum(np.bincount(bin_of, minlength=rooms.num_bins)))
