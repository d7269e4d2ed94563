"""Next-token cross-entropy, and the same loss fused with the vocabulary projection.

``linear_cross_entropy`` never holds the logits of all tokens: it works through chunks of tokens
and computes the gradients while a chunk's logits exist.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = -100  # a target that is no target; torch and transformers use the same value

CHUNK_BYTES = 128 * 2**20  # logits that exist at one time


def next_token_targets(labels: Tensor) -> Tensor:
    """Shift labels so that position t holds what the logits of position t must predict.

    Args:
        labels: ``[batch, seq]`` token ids, ``IGNORE_INDEX`` where a token is no target.

    Returns:
        ``[batch, seq]``: ``labels[:, t + 1]`` at position t, ``IGNORE_INDEX`` at the last.
    """
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[:, :-1] = labels[:, 1:]
    return targets


def count_targets(labels: Tensor) -> Tensor:
    """Count what ``next_token_targets(labels)`` leaves to predict.

    Args:
        labels: ``[batch, seq]`` token ids, unshifted.

    Returns:
        ``[]`` int64 on the labels' device (no synchronisation).
    """
    return (labels[:, 1:] != IGNORE_INDEX).sum()


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum the negative log-likelihood of the targets, from whole logits.

    Args:
        logits: ``[..., vocab]``, upcast to fp32 when of lower precision.
        targets: ``[...]`` class ids, already shifted; ``IGNORE_INDEX`` is left out.

    Returns:
        ``[]`` sum in nats.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, -2).to(dtype),
        targets.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, num_real_rows: int | None = None
) -> Tensor:
    """Sum the negative log-likelihood of ``targets`` under ``softmax(hidden @ weight.T)``.

    Args:
        hidden: ``[n, d]`` last hidden states.
        weight: ``[v, d]`` output embedding, same dtype as ``hidden``.
        targets: ``[n]`` row numbers of ``weight``, already shifted; ``IGNORE_INDEX`` is left out.
        num_real_rows: rows from this one on are padding and take no part in the softmax.

    Returns:
        ``[]`` sum in nats, fp32 (fp64 for fp64 input).
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, num_real_rows)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, num_real_rows):  # type: ignore[no-untyped-def]
        keep = (targets != IGNORE_INDEX).nonzero().squeeze(1)
        real = weight[:num_real_rows]
        acc = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=acc, device=hidden.device)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dhidden = torch.zeros_like(hidden, dtype=acc) if need_hidden else None
        dweight = torch.zeros_like(weight, dtype=acc) if need_weight else None
        chunk = max(1, CHUNK_BYTES // (max(1, len(real)) * acc.itemsize))
        for index in keep.split(chunk):
            rows, wanted = hidden[index], targets[index].unsqueeze(1)
            logits = (rows @ real.T).to(acc)
            lse = logits.logsumexp(1, keepdim=True)
            loss += (lse - logits.gather(1, wanted)).sum()
            if not (need_hidden or need_weight):
                continue
            probs = logits.sub_(lse).exp_()
            probs.scatter_add_(1, wanted, probs.new_full((), -1.0).expand_as(wanted))
            if dhidden is not None:
                dhidden[index] = probs @ real.to(acc)
            if dweight is not None:
                dweight[: len(real)].addmm_(probs.T, rows.to(acc))
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        grads = [
            None if grad is None else (grad * grad_output).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *grads, None, None


@torch.no_grad()
def linear_nll(
    hidden: Tensor, weight: Tensor, targets: Tensor, num_real_rows: int | None = None
) -> Tensor:
    """Return each token's negative log-likelihood, without gradients.

    Args: as ``linear_cross_entropy``.

    Returns:
        ``[n]`` nats in fp32; 0 where the target is ``IGNORE_INDEX``.
    """
    acc = torch.promote_types(hidden.dtype, torch.float32)
    nll = torch.zeros(targets.shape, dtype=acc, device=hidden.device)
    keep = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    real = weight[:num_real_rows]
    chunk = max(1, CHUNK_BYTES // (max(1, len(real)) * acc.itemsize))
    for index in keep.split(chunk):
        logits = (hidden[index] @ real.T).to(acc)
        wanted = logits.gather(1, targets[index].unsqueeze(1)).squeeze(1)
        nll[index] = logits.logsumexp(1) - wanted
    return nll
