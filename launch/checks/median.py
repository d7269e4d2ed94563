"""Comparison with the median: what most of the machine does is what the machine can do."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TypeVar

from launch.checks.finding import Level

SLOW_SHARE = 0.75  # of the median: a job goes at the pace of its slowest rank
BROKEN_SHARE = 0.5
LATE_FACTOR = 3.0  # times the median latency; latencies scatter more than bandwidths

K = TypeVar("K")


def shares(values: Mapping[K, float]) -> dict[K, float]:
    """Return every value as a share of the median."""
    middle = statistics.median(values.values()) if values else 0.0
    return {key: value / middle for key, value in values.items()} if middle else {}


def laggards(values: Mapping[K, float]) -> dict[K, float]:
    """Return what is slower than most, with its share of the median."""
    return {key: share for key, share in shares(values).items() if share < SLOW_SHARE}


def late(values: Mapping[K, float]) -> dict[K, float]:
    """Return the latencies that are far above the median, as multiples of it."""
    return {key: share for key, share in shares(values).items() if share > LATE_FACTOR}


def level_of(share: float) -> Level:
    """Return how bad a share of the median is."""
    return "error" if share < BROKEN_SHARE else "warning"


def spread(values: Mapping[K, float], unit: str) -> str:
    """Return ``0.8 to 1.1 GB/s, median 0.95``."""
    numbers = sorted(values.values())
    middle = statistics.median(numbers)
    if len(numbers) == 1:
        return f"{figure(middle)} {unit}"
    return f"{figure(numbers[0])} to {figure(numbers[-1])} {unit}, median {figure(middle)}"


def figure(value: float) -> str:
    """Return ``value`` with three digits, or all of its whole ones."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
