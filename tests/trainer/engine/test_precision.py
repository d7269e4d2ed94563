"""fp16's loss scale: when nothing is expected of the next step any more."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from trainer.engine.precision import MAX_OVERFLOWS, LossScale
from trainer.errors import NumericsError


def make_scale() -> tuple[LossScale, SimpleNamespace]:
    scaler = SimpleNamespace(raise_error_at_min_scale=True)
    return LossScale(SimpleNamespace(loss_scaler=scaler), 1), scaler


def test_overflows_in_a_row_at_the_smallest_scale_stop_the_run() -> None:
    scale, scaler = make_scale()
    assert not scaler.raise_error_at_min_scale  # DeepSpeed's own end says nothing of the run
    for value in (4.0, 2.0):
        scale.end_step(True, value)
    for _ in range(MAX_OVERFLOWS - 1):
        scale.end_step(True, 1.0)
    with pytest.raises(NumericsError, match=r"8 steps in a row .* steps: 4, 2, 1, 1, 1,"):
        scale.end_step(True, 1.0)


def test_a_step_that_is_done_begins_the_count_anew() -> None:
    scale, _ = make_scale()
    for _ in range(3):
        for _ in range(MAX_OVERFLOWS - 1):
            scale.end_step(True, 1.0)
        scale.end_step(False, 1.0)


def test_overflows_above_the_smallest_scale_are_no_collapse() -> None:
    scale, _ = make_scale()
    for _ in range(3 * MAX_OVERFLOWS):
        scale.end_step(True, 2.0)
