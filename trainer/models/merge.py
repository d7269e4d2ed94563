"""Adapters merged into the weights they adapt."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float,
    magnitude: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """Return the weight that computes what ``weight`` and its adapter compute together.

    W + s·B·A (eq. 3, arXiv:2106.09685). With DoRA, each output's row of that is scaled to a length
    of its own: m · (W + s·B·A) / ‖W + s·B·A‖ (eq. 5, arXiv:2402.09353).

    Args:
        weight: ``[out, in]``.
        down: A, ``[rank, in]``.
        up: B, ``[out, rank]``.
        scale: s.
        magnitude: m, ``[out]``, of a DoRA adapter.
        transposed: whether the model stores this weight as ``[in, out]`` (GPT-2).

    Returns:
        In the shape and dtype of ``weight``.
    """
    matrix = weight.T if transposed else weight
    merged = matrix + scale * (up @ down)
    if magnitude is not None:
        merged = merged * (magnitude / torch.linalg.norm(merged, dim=1))[:, None]
    return merged.T if transposed else merged
