"""Figures of a step's rollout."""

from __future__ import annotations

import math

import torch

from trainer.metrics.bag import MetricBag
from trainer.rollout.tally import add_explained_variance


def test_a_flat_step_does_not_spoil_its_window() -> None:
    bag, returns = MetricBag(), torch.tensor([0.0, 1.0, 2.0])
    flat = torch.ones(3)
    add_explained_variance(bag, flat, flat)
    add_explained_variance(bag, returns, returns)
    add_explained_variance(bag, flat, returns)
    assert bag.drain(lambda sums: sums)["explained_variance"] == 0.5
    add_explained_variance(bag, flat, flat)
    assert math.isnan(bag.drain(lambda sums: sums)["explained_variance"])  # nothing to explain
