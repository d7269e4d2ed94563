"""Figures of a judge that prefers one of two answers: accuracy, calibration, distribution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959963984540054  # two-sided 95 % of the normal distribution
NUM_CALIBRATION_BINS = 10
NUM_HISTOGRAM_BINS = 30

Scores = NDArray[np.float64]


def wilson_interval(num_right: float, num: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson, J. Am. Stat. Assoc. 22, 1927).

    Args:
        num_right: successes; a tie may count half.
        num: trials, one or more.
    """
    share, z2 = num_right / num, Z_95**2
    middle = share + z2 / (2 * num)
    reach = Z_95 * math.sqrt(share * (1 - share) / num + z2 / (4 * num**2))
    low, high = ((middle + sign * reach) / (1 + z2 / num) for sign in (-1, 1))
    return min(share, max(0.0, low)), max(share, min(1.0, high))  # rounding stays inside


def describe_pairs(chosen: Scores, rejected: Scores) -> dict[str, float]:
    """Return accuracy with its interval, mean margin, calibration error and moments of the scores.

    Args:
        chosen: ``[n]`` scores of the preferred answers, n at least 1.
        rejected: ``[n]`` scores of the others. An equal score counts as wrong.
    """
    num, num_right = len(chosen), int((chosen > rejected).sum())
    low, high = wilson_interval(num_right, num)
    scores = np.concatenate([chosen, rejected])
    return {
        "accuracy": num_right / num,
        "accuracy_low": low,
        "accuracy_high": high,
        "margin": float((chosen - rejected).mean()),
        "calibration_error": calibration_error(calibrate(chosen, rejected)),
        "reward_mean": float(scores.mean()),
        "reward_std": float(scores.std()),
        "num_pairs": num,
    }


def calibrate(chosen: Scores, rejected: Scores) -> list[dict[str, float]]:
    """Compare how sure the judge is with how often it is right, in bins of its confidence.

    The confidence in the answer that it prefers is σ(|chosen - rejected|), from a half to 1; the
    bins are ten of equal width. Empty ones are left out.

    Args:
        chosen: ``[n]`` scores of the preferred answers.
        rejected: ``[n]`` scores of the others.

    Returns:
        For each bin its mean ``confidence``, its ``accuracy`` and ``num``, the pairs in it.
    """
    confidence = 1 / (1 + np.exp(-np.abs(chosen - rejected)))
    number = ((confidence - 0.5) * 2 * NUM_CALIBRATION_BINS).astype(int)
    number = np.minimum(number, NUM_CALIBRATION_BINS - 1)
    bins = [number == index for index in range(NUM_CALIBRATION_BINS)]
    return [
        {
            "confidence": float(confidence[inside].mean()),
            "accuracy": float((chosen > rejected)[inside].mean()),
            "num": int(inside.sum()),
        }
        for inside in bins
        if inside.any()
    ]


def calibration_error(bins: list[dict[str, float]]) -> float:
    """Return the expected calibration error of bins (eq. 3, Guo et al., arXiv:1706.04599)."""
    num = sum(one["num"] for one in bins)
    return sum(one["num"] * abs(one["accuracy"] - one["confidence"]) for one in bins) / num


def count_scores(groups: dict[str, Scores]) -> dict[str, Any]:
    """Return a histogram of each group over common bins: ``edges`` and ``counts`` by name.

    Args:
        groups: scores by name, each ``[n]``.
    """
    everything = np.concatenate(list(groups.values()))
    edges = np.histogram_bin_edges(everything, NUM_HISTOGRAM_BINS)
    counts = {name: np.histogram(own, edges)[0].tolist() for name, own in groups.items()}
    return {"edges": edges.tolist(), "counts": counts}
