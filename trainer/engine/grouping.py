"""What the optimizer sees of a model: parameter groups, and the norm of all gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from trainer.errors import ConfigError


def group_parameters(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups of trained parameters: decayed matrices, undecayed vectors.

    Raises:
        ConfigError: when nothing is trained.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ConfigError("no parameter is trained: check peft.mode and peft.trainable")
    groups = [
        {"params": [p for p in params if _num_dims(p) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if _num_dims(p) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _num_dims(param: torch.nn.Parameter) -> int:
    """Return the dimensions of a parameter, partitioned by ZeRO-3 or not."""
    return len(param.ds_shape) if "ds_shape" in vars(param) else param.dim()


def global_norm(params: Iterator[torch.nn.Parameter]) -> torch.Tensor:
    """Return the 2-norm of all gradients (replicated on every rank), on their device."""
    norms = [torch.linalg.vector_norm(p.grad) for p in params if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(norms))
