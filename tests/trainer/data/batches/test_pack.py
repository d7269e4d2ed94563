"""Packing loses no token, repeats none, and finds any row at once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.batches.pack import Packer, Piece, shuffle

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def make(values: list[int], max_length: int, packing: bool, key: str = "k") -> Packer:
    array = np.array(values)
    ids = np.arange(len(array)) * 2  # documents of a store, not all of them
    return Packer(ids, array, max_length=max_length, packing=packing, seed_key=key)


@settings(deadline=None)
@given(lengths, st.integers(2, 50), st.booleans(), st.integers(0, 3))
def test_every_token_lands_in_exactly_one_row_of_an_epoch(
    values: list[int], max_length: int, packing: bool, epoch: int
) -> None:
    packer = make(values, max_length, packing)
    first = epoch * packer.rows_per_epoch
    rows = [packer.row(first + i) for i in range(packer.rows_per_epoch)]
    seen = Counter((p.document, t) for row in rows for p in row for t in range(p.start, p.stop))
    assert seen == {(2 * i, t): 1 for i, n in enumerate(values) for t in range(n)}
    sizes = [sum(p.stop - p.start for p in row) for row in rows]
    assert max(sizes) <= max_length and min(sizes) > 0
    if packing:
        assert all(size == max_length for size in sizes[:-1])  # only an epoch's end is padded
    else:
        assert all(len(row) == 1 for row in rows)


@settings(deadline=None)
@given(lengths, st.integers(2, 50), st.booleans(), st.randoms())
def test_rows_do_not_depend_on_the_order_of_asking(
    values: list[int], max_length: int, packing: bool, random: object
) -> None:
    packer = make(values, max_length, packing)
    indices = list(range(3 * packer.rows_per_epoch))
    in_order = [packer.row(i) for i in indices]
    random.shuffle(indices)  # type: ignore[attr-defined]
    again = make(values, max_length, packing)
    assert all(again.row(i) == in_order[i] for i in indices)


def test_document_tail_goes_on_in_the_next_row() -> None:
    packer = make([5], 3, packing=True)
    assert [packer.row(0), packer.row(1)] == [[Piece(0, 0, 3)], [Piece(0, 3, 5)]]


def test_orders_differ_between_epochs_and_seeds() -> None:
    orders = {key: tuple(shuffle(50, key)) for key in ("0/a/0", "0/a/1", "1/a/0", "0/b/0")}
    assert len(set(orders.values())) == 4
    assert all(sorted(order) == list(range(50)) for order in orders.values())


def test_known_order_never_changes() -> None:
    """A resumed run replays its documents: this order is part of the format of a run."""
    assert shuffle(8, "0/source/0").tolist() == [6, 3, 7, 0, 1, 2, 4, 5]


@pytest.mark.parametrize("num_items", [0, 1])
def test_short_shuffles(num_items: int) -> None:
    assert shuffle(num_items, "k").tolist() == list(range(num_items))
