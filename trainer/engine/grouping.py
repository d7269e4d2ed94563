"""What the optimizer sees of a model: parameter groups, and the norm of all gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from trainer.errors import ConfigError


def group_parameters(
    model: torch.nn.Module,
    weight_decay: float,
    lr_factors: Mapping[str, float],
    apart: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return groups of trained parameters: decayed matrices, undecayed vectors, by learning rate.

    Args:
        model: the model.
        weight_decay: of matrices.
        lr_factors: factors of the learning rate by a part of the parameters' names; those of
            several parts in a name multiply.
        apart: parts of names whose parameters get groups of their own.

    Raises:
        ConfigError: when nothing is trained.
    """
    groups: dict[tuple[float, float, tuple[str, ...]], list[torch.nn.Parameter]] = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            decay = weight_decay if _num_dims(param) >= 2 else 0.0
            parts = tuple(part for part in apart if part in name)
            groups.setdefault((_lr_factor(name, lr_factors), decay, parts), []).append(param)
    if not groups:
        raise ConfigError("no parameter is trained: check peft.mode and peft.trainable")
    return [
        {"params": params, "weight_decay": decay, "lr_factor": factor, "parts": parts}
        for (factor, decay, parts), params in groups.items()
    ]


def _lr_factor(name: str, lr_factors: Mapping[str, float]) -> float:
    return math.prod(factor for part, factor in lr_factors.items() if part in name)


def _num_dims(param: torch.nn.Parameter) -> int:
    """Return the dimensions of a parameter, partitioned by ZeRO-3 or not."""
    return len(param.ds_shape) if "ds_shape" in vars(param) else param.dim()


def num_weights(param: torch.nn.Parameter) -> int:
    """Return the weights that a parameter holds, also packed by quantisation or split by ZeRO-3."""
    own = vars(param)
    return int(own.get("num_weights", own.get("ds_numel", param.numel())))


def trained_share(model: torch.nn.Module) -> float:
    """Return the share of the parameters that is trained."""
    sizes = [(num_weights(param), param.requires_grad) for param in model.parameters()]
    return sum(size for size, trained in sizes if trained) / sum(size for size, _ in sizes)


def global_norm(
    params: Iterator[torch.nn.Parameter], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return the 2-norm of all gradients (replicated on every rank), on their device.

    Args:
        params: whose gradients.
        dtype: it is computed in; None = the gradients' own.
    """
    norms = [torch.linalg.vector_norm(p.grad, dtype=dtype) for p in params if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(norms))
