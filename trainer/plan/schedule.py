"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math


def lr_factor(
    name: str,
    step: int,
    *,
    max_steps: int,
    warmup_steps: int = 0,
    min_lr_ratio: float = 0.0,
    decay_share: float = 0.2,
) -> float:
    """Return the factor of the peak learning rate used by optimizer step ``step`` (from 0).

    Args:
        name: ``cosine`` (arXiv:1608.03983, one cycle), ``linear``, ``constant``, or ``wsd``:
            warm-up, stable, then a linear decay over the last ``decay_share`` of the steps
            (arXiv:2404.06395).
        step: steps already done.
        max_steps: steps of the whole run.
        warmup_steps: steps of linear warm-up; the first step uses ``1 / warmup_steps``.
        min_lr_ratio: factor reached at the last step.
        decay_share: for ``wsd``.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if name == "constant":
        return 1.0
    start = warmup_steps
    if name == "wsd":
        start = max(warmup_steps, max_steps - round(max_steps * decay_share))
    progress = min(1.0, max(0.0, (step - start) / max(1, max_steps - 1 - start)))
    shape = (1 + math.cos(math.pi * progress)) / 2 if name == "cosine" else 1 - progress
    return min_lr_ratio + (1 - min_lr_ratio) * shape
