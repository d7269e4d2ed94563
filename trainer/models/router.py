"""The auxiliary loss that keeps the experts of a mixture evenly loaded."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from trainer.losses.cross_entropy import IGNORE_INDEX


def router_loss_coefficient(config: PreTrainedConfig) -> float:
    """Return the model's own coefficient of the router loss; 0 for a model without one."""
    return float(getattr(config, "router_aux_loss_coef", None) or 0.0)


def router_loss_sum(
    router_logits: tuple[Tensor, ...],
    config: PreTrainedConfig,
    labels: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the load-balancing loss (eq. 4 to 6 of arXiv:2101.03961), weighted and summed.

    The loss is a mean over tokens and takes them for independent draws. Times the batch's targets
    it adds up like a next-token loss: divided by the targets of the whole step it is the mean over
    micro-batches, weighted by their targets.

    Args:
        router_logits: ``[batch * seq, experts]`` of each layer.
        config: the model's; gives the coefficient and the experts per token.
        labels: ``[batch, seq]`` token ids, unshifted; ``IGNORE_INDEX`` is no target.
        weights: ``[batch, seq]`` factor of each target's loss, unshifted; None is 1.

    Returns:
        ``[]`` the loss, times its coefficient and the (weighted) number of targets.
    """
    is_target = labels != IGNORE_INDEX
    counted = is_target[:, 1:]
    num_targets = counted.sum() if weights is None else (weights[:, 1:] * counted).sum()
    return router_loss_mean(router_logits, config, is_target) * num_targets.to(torch.float32)


def router_loss_mean(
    router_logits: tuple[Tensor, ...], config: PreTrainedConfig, is_target: Tensor
) -> Tensor:
    """Return the load-balancing loss times its coefficient, a mean over tokens.

    Args:
        router_logits: ``[batch * seq, experts]`` of each layer.
        config: the model's.
        is_target: ``[batch, seq]`` tokens that the main loss looks at. Those that none follows are
            padding, or as idle as padding, and do not count.

    Returns:
        ``[]``.
    """
    layers = tuple(logits.flatten(0, -2) for logits in router_logits)
    real = is_target.flip(1).cummax(1).values.flip(1)
    real = real | ~real.any()  # a batch without a target counts 0 times, not 0 times NaN
    share = load_balancing_loss_func(layers, layers[0].shape[-1], config.num_experts_per_tok, real)
    return router_loss_coefficient(config) * share
