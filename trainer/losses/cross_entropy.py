"""Next-token cross-entropy, and the same loss fused with the vocabulary projection.

``linear_cross_entropy`` never holds the logits of all tokens: it works through chunks of tokens
and computes the gradients while a chunk's logits exist. Its memory above the gradients themselves
is a constant, ``CHUNK_BYTES``, whatever the sequence length and the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.losses.vocabulary import (
    add_mixed_rows,
    cut_chunks,
    cut_tiles,
    fill_chunk,
    mix_rows,
    multiply,
    scale_gradient,
    storage_scale,
    wide_dtype,
)

IGNORE_INDEX = -100  # a target that is no target; torch and transformers use the same value


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


def next_token_weights(weights: Tensor) -> Tensor:
    """Shift loss weights as ``next_token_targets`` shifts labels.

    Args:
        weights: ``[batch, seq]`` weight of each token as a target, unshifted.

    Returns:
        ``[batch, seq]``: ``weights[:, t + 1]`` at position t, 0 at the last.
    """
    return torch.nn.functional.pad(weights[:, 1:], (0, 1))


def cross_entropy_sum(
    logits: Tensor, targets: Tensor, token_weights: Tensor | None = None
) -> Tensor:
    """Sum the negative log-likelihood of the targets, from whole logits.

    Args:
        logits: ``[..., vocab]``, upcast to fp32 when of lower precision.
        targets: ``[...]`` class ids, already shifted; ``IGNORE_INDEX`` is left out.
        token_weights: ``[...]`` factor of each target's loss, already shifted; None is 1.

    Returns:
        ``[]`` sum in nats.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, -2).to(dtype),
        targets.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum" if token_weights is None else "none",
    )
    return nll if token_weights is None else nll @ token_weights.flatten().to(nll.dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    num_real_rows: int | None = None,
    token_weights: Tensor | None = None,
) -> Tensor:
    """Sum the negative log-likelihood of ``targets`` under ``softmax(hidden @ weight.T)``.

    The gradients are computed beside the loss, in one pass over the tokens, and held in fp32 until
    backward has multiplied them by the incoming gradient: an fp16 loss scale acts before they
    are rounded to fp16.

    Args:
        hidden: ``[n, d]`` last hidden states.
        weight: ``[v, d]`` output embedding, same dtype as ``hidden``.
        targets: ``[n]`` row numbers of ``weight``, already shifted; ``IGNORE_INDEX`` is left out.
        num_real_rows: rows from this one on are padding and take no part in the softmax.
        token_weights: ``[n]`` factor of each target's loss, 0 or more, already shifted; None is 1.

    Returns:
        ``[]`` sum in nats, fp32 (fp64 for fp64 input).

    Raises:
        RuntimeError: when a target is no real row (on CUDA, as a device-side assertion).
    """
    if token_weights is None:
        token_weights = torch.ones_like(targets, dtype=wide_dtype(hidden.dtype))
    token_weights = token_weights.to(wide_dtype(hidden.dtype))
    if not torch.is_grad_enabled():
        return (linear_nll(hidden, weight, targets, num_real_rows) * token_weights).sum()
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, token_weights, num_real_rows)
    return loss


@torch.no_grad()
def linear_nll(
    hidden: Tensor, weight: Tensor, targets: Tensor, num_real_rows: int | None = None
) -> Tensor:
    """Return each token's negative log-likelihood, without gradients.

    Args:
        hidden: ``[n, d]`` last hidden states.
        weight: ``[v, d]`` output embedding, same dtype as ``hidden``.
        targets: ``[n]`` row numbers of ``weight``, already shifted.
        num_real_rows: rows from this one on are padding and take no part in the softmax.

    Returns:
        ``[n]`` nats in fp32 (fp64 for fp64 input); 0 where the target is ``IGNORE_INDEX``.
    """
    weight = weight[:num_real_rows]
    nll = torch.zeros_like(targets, dtype=wide_dtype(hidden.dtype))
    for index in cut_chunks(_target_positions(targets), weight):
        filled = fill_chunk(index, hidden)
        nll[index] = _softmax(hidden[filled], weight, targets[filled], None)[0][: len(index)]
    return nll


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_weights: Tensor,
        num_real_rows: int | None,
    ) -> Tensor:
        need_hidden, need_weight, *_ = ctx.needs_input_grad
        wide = wide_dtype(hidden.dtype)
        hidden_grad = torch.zeros_like(hidden, dtype=wide) if need_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=wide) if need_weight else None
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        real = weight[:num_real_rows]
        # Stored probabilities carry weight / heaviest, 1 at most, so that fp16 does not overflow.
        heaviest = torch.nn.functional.pad(token_weights, (0, 1)).max()
        heaviest = heaviest.where(heaviest > 0, 1.0)
        scales = token_weights * (storage_scale(hidden.dtype) / heaviest)
        for index in cut_chunks(_target_positions(targets), real):
            filled, num_tokens = fill_chunk(index, hidden), len(index)
            rows, wanted = hidden[filled], targets[filled]
            own_scales = scales[filled]
            own_scales[num_tokens:] = 0
            nll, probs = _softmax(rows, real, wanted, own_scales)
            loss += (nll[:num_tokens] * token_weights[index]).sum()
            # The target's own entry of the logits' gradient, p - 1, is most of the gradient: it
            # goes in apart, in fp32, where low-precision probabilities would round it.
            at_target = (torch.expm1(-nll) * own_scales)[:, None]
            if hidden_grad is not None:
                mixed = mix_rows(probs, real).addcmul_(at_target, real[wanted])
                hidden_grad[index] = mixed[:num_tokens]
            if weight_grad is not None:
                add_mixed_rows(weight_grad, probs, rows)
                weight_grad.index_put_((wanted,), at_target * rows, accumulate=True)
            del probs  # before the next chunk's logits are made
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.dtype = hidden.dtype
        ctx.factor = heaviest / storage_scale(hidden.dtype)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        factor = grad_output * ctx.factor
        grads = [scale_gradient(grad, factor, ctx.dtype) for grad in ctx.saved_tensors]
        return *grads, None, None, None


def _target_positions(targets: Tensor) -> Tensor:
    return (targets != IGNORE_INDEX).nonzero().squeeze(1)


def _softmax(
    hidden: Tensor, weight: Tensor, targets: Tensor, scales: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return each token's loss and the probabilities of all rows but its target.

    On a CPU the softmax runs over a few tokens at a time, so that its fp32 passes stay in cache.

    Args:
        hidden: ``[t, d]``.
        weight: ``[v, d]``.
        targets: ``[t]``, all of them rows of ``weight``.
        scales: ``[t]`` factors of the probabilities; None leaves the second result meaningless.

    Returns:
        ``[t]`` nats and ``[t, v]`` in the dtype of ``hidden``, times ``scales``, 0 at the targets.
    """
    logits = multiply(hidden, weight.T)
    probs = logits if logits.dtype == hidden.dtype else torch.empty_like(logits, dtype=hidden.dtype)
    nll = torch.empty_like(targets, dtype=wide_dtype(hidden.dtype))
    for rows in cut_tiles(logits):
        tile = logits[rows].to(nll.dtype)  # a view where the logits are wide already
        wanted = targets[rows, None]
        tile -= tile.amax(1, keepdim=True)
        at_target = tile.gather(1, wanted)
        total = tile.exp_().sum(1, keepdim=True)
        nll[rows] = (total.log() - at_target).squeeze(1)
        if scales is not None:
            tile *= scales[rows, None] / total
            probs[rows] = tile.scatter_(1, wanted, 0.0)
    return nll, probs
