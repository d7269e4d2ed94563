"""The mixture is seekable and keeps its proportions at any moment."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.batches.mixture import Mixture, floor_sum
from trainer.errors import DataError

weights = st.lists(st.just(0.0) | st.floats(1e-3, 1e3), min_size=1, max_size=6).filter(
    lambda values: sum(values) > 0
)


def make(values: list[float], seed: int = 0) -> Mixture:
    names = [f"s{i}" for i in range(len(values))]
    return Mixture(dict(zip(names, values, strict=True)), dict.fromkeys(names, 10), seed)


@settings(deadline=None)
@given(weights, st.integers(0, 10**12), st.integers(0, 500), st.integers(0, 2**31))
def test_any_stretch_is_found_without_walking_to_it(
    values: list[float], start: int, length: int, seed: int
) -> None:
    mixture = make(values, seed)
    before, after = mixture.counts_at(start), mixture.counts_at(start + length)
    assert sum(before) == start
    source_ids, source_rows = mixture.draw(start, start + length)
    for index, value in enumerate(values):
        rows = source_rows[source_ids == index]
        assert rows.tolist() == list(range(before[index], after[index]))
        assert value > 0 or after[index] == 0


@settings(deadline=None)
@given(weights, st.integers(1, 3000), st.integers(0, 100))
def test_every_prefix_holds_every_source_in_proportion(
    values: list[float], length: int, seed: int
) -> None:
    counts = make(values, seed).counts_at(length)
    for count, value in zip(counts, values, strict=True):
        # The discrepancy of golden-ratio points grows with the logarithm of their number.
        assert abs(count - length * value / sum(values)) <= 2 + np.log2(length)


def test_drawing_in_parts_equals_drawing_at_once() -> None:
    mixture = make([3.0, 1.0, 0.5], seed=4)
    whole = mixture.draw(0, 100)
    parts = [mixture.draw(start, start + 10) for start in range(0, 100, 10)]
    for column, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert column.tolist() == np.concatenate(pieces).tolist()


def test_known_sequence_never_changes() -> None:
    """A resumed run replays its mixture: this order is part of the format of a run."""
    assert make([2.0, 1.0], seed=7).draw(0, 12)[0].tolist() == [0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0]


def test_epochs_are_passes_over_a_source() -> None:
    mixture = Mixture({"a": 1.0, "b": 1.0}, {"a": 10, "b": 1000}, seed=0)
    counts = mixture.counts_at(400)
    assert mixture.epochs_at(400) == {"a": counts[0] / 10, "b": counts[1] / 1000}


def test_sources_that_cannot_be_drawn_are_refused() -> None:
    with pytest.raises(DataError, match="no weight above 0"):
        Mixture({"a": 0.0}, {"a": 5}, 0)
    with pytest.raises(DataError, match=r"data.sources.a.weight=1, but no document"):
        Mixture({"a": 1.0, "b": 1.0}, {"a": 0, "b": 5}, 0)
    Mixture({"a": 0.0, "b": 1.0}, {"a": 0, "b": 5}, 0)


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(1, 50), st.integers(0, 200), st.integers(0, 200))
def test_floor_sum_equals_the_sum(n: int, m: int, a: int, b: int) -> None:
    assert floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n))


def test_weights_that_count_passes() -> None:
    rows = {"a": 30, "b": 10, "c": 50}
    mixture = Mixture({"a": 1.0, "b": 3.0, "c": 0.0}, rows, seed=0, by_pass=True)
    assert mixture.rows_per_pass == 60
    for num_passes in (1, 2, 7):
        epochs = mixture.epochs_at(60 * num_passes)
        assert epochs["a"] == pytest.approx(num_passes, abs=0.1)
        assert epochs["b"] == pytest.approx(3 * num_passes, abs=0.3)
        assert epochs["c"] == 0


def test_one_source_is_passed_over_exactly() -> None:
    mixture = Mixture({"a": 0.5}, {"a": 13}, seed=4, by_pass=True)
    assert mixture.rows_per_pass == 6.5
    assert mixture.epochs_at(26) == {"a": 2.0}


def test_a_pass_over_shares_is_every_drawn_source_once() -> None:
    mixture = Mixture({"a": 0.9, "b": 0.1, "c": 0.0}, {"a": 30, "b": 10, "c": 99}, seed=0)
    assert mixture.rows_per_pass == 40


@pytest.mark.parametrize(
    ("passes", "rows_per_step", "expected"),
    [(3, 8, 12), (1, 8, 4), (1, 7, 5), (0.1, 8, 1), (0.01, 8, 1), (0.7, 7, 4)],
)
def test_steps_of_passes(passes: float, rows_per_step: int, expected: int) -> None:
    mixture = Mixture({"a": 1.0}, {"a": 32}, seed=0, by_pass=True)
    assert mixture.num_steps(passes, rows_per_step) == expected


def test_source_without_rows_is_refused_also_by_pass() -> None:
    with pytest.raises(DataError, match=r"data.sources.a.weight=1, but no document"):
        Mixture({"a": 1.0, "b": 1.0}, {"a": 0, "b": 3}, seed=0, by_pass=True)
