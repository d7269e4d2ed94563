"""Figures of pairs against hand computations and published values."""

import numpy as np
import pytest

from trainer.metrics.pairwise import (
    calibrate,
    calibration_error,
    count_scores,
    describe_pairs,
    wilson_interval,
)


def test_wilson_interval_equals_published_values() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    for num_right, num, expected in (
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ):
        assert wilson_interval(num_right, num) == pytest.approx(expected, abs=5e-5)
    assert wilson_interval(27, 27)[1] == 1.0 and wilson_interval(0, 27)[0] == 0.0


def test_calibration_by_hand() -> None:
    # Confidence 0.6 twice (once right), 0.98 twice (both right): bins 2 and 9.
    small, large = np.log(0.6 / 0.4), np.log(0.98 / 0.02)
    chosen = np.array([small, 0.0, large, large])
    rejected = np.array([0.0, small, 0.0, 0.0])
    bins = calibrate(chosen, rejected)
    assert [b["num"] for b in bins] == [2, 2]
    assert [b["confidence"] for b in bins] == pytest.approx([0.6, 0.98])
    assert [b["accuracy"] for b in bins] == [0.5, 1.0]
    assert calibration_error(bins) == pytest.approx((2 * 0.1 + 2 * 0.02) / 4)


def test_calibration_error_of_a_calibrated_judge_vanishes() -> None:
    random = np.random.default_rng(0)
    margins = random.normal(0, 2, 200_000)
    is_right = random.random(200_000) < 1 / (1 + np.exp(-margins))
    chosen = np.where(is_right, margins, -margins)
    assert calibration_error(calibrate(chosen, np.zeros_like(chosen))) < 0.005
    assert calibration_error(calibrate(5 * chosen, np.zeros_like(chosen))) > 0.1
    assert calibration_error(calibrate(np.array([1e3]), np.array([0.0]))) == 0.0


def test_figures_of_pairs() -> None:
    chosen, rejected = np.array([1.0, 2.0, 0.0, 1.0]), np.array([0.0, 0.0, 1.0, 1.0])
    figures = describe_pairs(chosen, rejected)
    assert figures["accuracy"] == 0.5  # a tie is no success
    assert figures["margin"] == 0.5 and figures["num_pairs"] == 4
    assert figures["reward_mean"] == 0.75
    assert figures["reward_std"] == pytest.approx(np.sqrt(np.mean([0.5625] * 1 + [0.0625] * 4
        + [1.5625] + [0.5625] * 2)))  # fmt: skip
    assert figures["accuracy_low"] < 0.5 < figures["accuracy_high"]


def test_histogram_has_common_bins_and_loses_nothing() -> None:
    groups = {"chosen": np.array([0.0, 0.1, 3.0]), "rejected": np.array([-3.0, -2.9])}
    counted = count_scores(groups)
    assert counted["edges"][0] == -3.0 and counted["edges"][-1] == 3.0
    assert {name: sum(counts) for name, counts in counted["counts"].items()} == {
        "chosen": 3, "rejected": 2
    }  # fmt: skip
    assert counted["counts"]["rejected"][0] == 2
    same = count_scores({"chosen": np.array([1.0]), "rejected": np.array([1.0])})
    assert sum(same["counts"]["chosen"]) == 1
