"""Figures of a model on held-out documents."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from trainer.data.batches.collate import Batch
from trainer.data.batches.eval_loader import EvalLoader
from trainer.engine.collectives import any_over_ranks, sum_over_ranks
from trainer.signals import StopRequest


@torch.no_grad()
def evaluate_source(
    loader: EvalLoader,
    loss: Callable[[Batch], torch.Tensor],
    device: torch.device,
    stop: StopRequest,
) -> dict[str, float] | None:
    """Return one source's figures, or None when all ranks agreed to stop.

    Args:
        loader: this rank's share of the source's held-out documents.
        loss: the summed loss of a batch, [].
        device: where the sum is kept.
        stop: asked between batches.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in loader:
        if any_over_ranks(stop.requested):
            return None
        total += loss(batch)
    nll = sum_over_ranks([float(total)])[0]
    return describe_nll(nll, loader.num_targets, loader.num_chars, loader.num_bytes)


def describe_nll(nll: float, num_tokens: float, num_chars: int, num_bytes: int) -> dict[str, float]:
    """Return the figures of a summed negative log-likelihood (nats) over whole documents.

    Bits per character and per byte compare models with different vocabularies; loss and
    perplexity per token do not.
    """
    loss, bits = nll / num_tokens, nll / math.log(2)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_character": bits / num_chars,
        "bits_per_byte": bits / num_bytes,
        "num_tokens": num_tokens,
        "num_chars": num_chars,
    }
