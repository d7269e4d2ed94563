"""Learning-rate factors against hand values."""

from __future__ import annotations

import math

import pytest

from trainer.plan.schedule import lr_factor


@pytest.mark.parametrize("name", ["cosine", "wsd", "linear", "constant"])
def test_warm_up_is_linear_and_ends_at_the_peak(name: str) -> None:
    factors = [lr_factor(name, s, max_steps=20, warmup_steps=4) for s in range(5)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["cosine", "wsd", "linear"])
def test_last_step_reaches_the_ratio(name: str) -> None:
    assert lr_factor(name, 19, max_steps=20, min_lr_ratio=0.1) == pytest.approx(0.1)
    assert lr_factor(name, 500, max_steps=20, min_lr_ratio=0.1) == pytest.approx(0.1)


def test_shapes_between() -> None:
    middle = {"max_steps": 21, "min_lr_ratio": 0.2}
    assert lr_factor("cosine", 10, **middle) == pytest.approx(0.2 + 0.8 * 0.5)
    assert lr_factor("cosine", 5, **middle) == pytest.approx(
        0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2
    )
    assert lr_factor("linear", 5, **middle) == pytest.approx(0.8)
    assert lr_factor("constant", 5, **middle) == 1.0


def test_wsd_is_stable_until_its_decay() -> None:
    factors = [lr_factor("wsd", s, max_steps=20, decay_share=0.25) for s in range(20)]
    assert factors[:16] == [1.0] * 16
    assert factors[16:] == pytest.approx([0.75, 0.5, 0.25, 0.0])


def test_one_step_run_uses_the_peak() -> None:
    assert lr_factor("cosine", 0, max_steps=1) == 1.0
