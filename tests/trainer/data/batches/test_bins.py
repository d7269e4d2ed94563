"""Whole documents in bins: nothing lost, nothing cut, nothing over the edge."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.batches.bins import fill_bins
from trainer.data.batches.pack import Piece, WholePacker
from trainer.errors import DataError

CAPACITY = 40
lengths = st.lists(st.integers(1, CAPACITY), max_size=60)


def loads(values: list[int], capacity: int = CAPACITY) -> list[list[int]]:
    """Return the lengths in each bin."""
    descending = np.sort(np.array(values, np.int64))[::-1]
    bins = fill_bins(np.array(values, np.int64), capacity)
    return [descending[bins[i]].tolist() for i in range(len(bins))]


def one_by_one(values: list[int], capacity: int = CAPACITY) -> list[list[int]]:
    """Best-fit decreasing as it is usually written."""
    bins: list[list[int]] = []
    for length in sorted(values, reverse=True):
        open_bins = [b for b in bins if sum(b) + length <= capacity]
        if open_bins:
            max(open_bins, key=sum).append(length)
        else:
            bins.append([length])
    return bins


@settings(deadline=None)
@given(lengths)
def test_every_document_is_in_one_bin_and_fits(values: list[int]) -> None:
    bins = loads(values)
    assert sorted(length for b in bins for length in b) == sorted(values)
    assert all(0 < sum(b) <= CAPACITY for b in bins)
    assert all(b == sorted(b, reverse=True) for b in bins)
    places = fill_bins(np.array(values, np.int64), CAPACITY).places
    assert sorted(places.tolist()) == list(range(len(values)))


@settings(deadline=None)
@given(lengths)
def test_dealing_in_groups_is_best_fit_decreasing(values: list[int]) -> None:
    # Of bins with equal room either may take a document: what is left in them is the same.
    assert sorted(map(sum, loads(values))) == sorted(map(sum, one_by_one(values)))


def test_by_hand() -> None:
    assert loads([4, 6, 3, 7, 10], capacity=10) == [[10], [7, 3], [6, 4]]
    assert loads([3] * 7, capacity=10) == [[3, 3, 3], [3, 3, 3], [3]]


def test_a_million_conversations_fill_their_rows_within_seconds() -> None:
    random = np.random.default_rng(0)
    values = np.clip(random.lognormal(5.5, 0.9, 1_000_000).astype(np.int64), 8, 2048)
    start = time.perf_counter()
    packer = WholePacker(np.arange(len(values)), values, max_length=2048, seed_key="k")
    packer.row(0)
    assert time.perf_counter() - start < 10
    assert packer.fill_share > 0.999


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(0, 3), st.randoms())
def test_rows_hold_whole_documents_once_an_epoch(
    values: list[int], epoch: int, random: object
) -> None:
    ids = np.arange(len(values)) * 2  # documents of a store, not all of them
    array = np.array(values)
    packer = WholePacker(ids, array, max_length=CAPACITY, seed_key="k")
    first = epoch * packer.rows_per_epoch
    indices = list(range(first, first + packer.rows_per_epoch))
    in_order = [packer.row(index) for index in indices]
    pieces = sorted(piece for row in in_order for piece in row)
    assert pieces == [Piece(2 * i, 0, length) for i, length in enumerate(values)]
    assert all(sum(piece.stop for piece in row) <= CAPACITY for row in in_order)
    assert packer.fill_share == sum(values) / (CAPACITY * packer.rows_per_epoch)
    random.shuffle(indices)  # type: ignore[attr-defined]
    again = WholePacker(ids, array, max_length=CAPACITY, seed_key="k")
    again.row(7 * packer.rows_per_epoch)
    assert all(again.row(index) == in_order[index - first] for index in indices)


def test_epochs_deal_documents_of_equal_length_anew() -> None:
    packer = WholePacker(np.arange(60), np.full(60, 10), max_length=CAPACITY, seed_key="k")
    together = [
        {frozenset(p.document for p in packer.row(e * 15 + i)) for i in range(15)} for e in (0, 1)
    ]
    assert len(together[0]) == 15 and not together[0] & together[1]


def test_known_rows_never_change() -> None:
    """A resumed run replays its rows: they are part of the format of a run."""
    packer = WholePacker(np.arange(6), np.array([5, 4, 3, 3, 2, 1]), max_length=6, seed_key="0/s")
    rows = [[piece.document for piece in packer.row(i)] for i in range(packer.rows_per_epoch)]
    assert rows == [[0, 5], [1, 4], [3, 2]]


def test_a_document_longer_than_a_row_is_refused() -> None:
    with pytest.raises(DataError, match=r"41 tokens, more than data\.max_length=40"):
        WholePacker(np.arange(2), np.array([41, 3]), max_length=40, seed_key="k")
