"""Log-probabilities of given tokens, fused with the vocabulary projection.

What becomes of a log-probability (a ratio, a margin between two answers) is only known once all
are there, so the gradient cannot be made beside the value, as a loss's can. ``linear_logps`` works
through chunks of tokens; for backward it keeps the logits of the first ``KEPT_BYTES`` and computes
the others again, chunk by chunk. Its memory above the gradients themselves is a constant.
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

KEPT_BYTES = 64 * 2**20  # logits kept for backward, which saves one of four products


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    num_real_rows: int | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the log-probability of each target under ``softmax(hidden @ weight.T / temperature)``.

    Args:
        hidden: ``[n, d]`` hidden states that predict the targets.
        weight: ``[v, d]`` output embedding, same dtype as ``hidden``; may be a parameter that
            ZeRO-3 gathers for forward and backward.
        targets: ``[n]`` row numbers of ``weight``.
        num_real_rows: rows from this one on are padding and take no part in the softmax.
        temperature: of sampling, which the logits are divided by.
        with_entropy: also return the entropy of each distribution.

    Returns:
        ``[n]`` nats in fp32 (fp64 for fp64 input); or these and ``[n]`` entropies in nats.

    Raises:
        RuntimeError: when a target is no real row (on CUDA, as a device-side assertion).
    """
    logps, entropies = _LinearLogps.apply(
        hidden, weight, targets, num_real_rows, temperature, with_entropy, torch.is_grad_enabled()
    )
    return (logps, entropies) if with_entropy else logps


def logps_from_logits(
    logits: Tensor,
    targets: Tensor,
    num_real_rows: int | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return what ``linear_logps`` does, from logits: for heads that do more than a product.

    Args:
        logits: ``[n, v]``, upcast to fp32 when of lower precision.
        targets: ``[n]`` class ids.
        num_real_rows: columns from this one on are padding.
        temperature: of sampling.
        with_entropy: also return the entropies.

    Returns:
        ``[n]`` nats; or these and ``[n]`` entropies.
    """
    wide = logits[:, :num_real_rows].to(wide_dtype(logits.dtype)) / temperature
    every = wide.log_softmax(1)
    logps = every.gather(1, targets[:, None]).squeeze(1)
    return (logps, -(every.exp() * every).sum(1)) if with_entropy else logps


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        num_real_rows: int | None,
        temperature: float,
        with_entropy: bool,
        has_backward: bool,
    ) -> tuple[Tensor, Tensor]:
        real = weight[:num_real_rows]
        logps = torch.zeros_like(targets, dtype=wide_dtype(hidden.dtype))
        entropies = torch.zeros_like(logps)
        kept: list[Tensor] = []
        room = KEPT_BYTES if has_backward else 0
        for index in cut_chunks(torch.arange(len(targets), device=targets.device), real):
            rows = fill_chunk(index, hidden)
            logits = multiply(hidden[rows], real.T)
            for tile in cut_tiles(logits):
                here = rows[tile]
                every = _log_softmax(logits[tile], temperature)
                logps[here] = every.gather(1, targets[here, None]).squeeze(1)
                if with_entropy:
                    entropies[here] = every.exp().mul_(every).sum(1).neg_()
            room -= logits.numel() * logits.itemsize
            if room >= 0:
                kept.append(logits)
            del logits  # before the next chunk's are made
        # By reference: a weight that ZeRO-3 splits after forward is whole again for backward.
        ctx.save_for_backward(hidden, weight, targets, logps, entropies)
        ctx.num_real_rows, ctx.temperature, ctx.kept = num_real_rows, temperature, kept
        if not with_entropy:
            ctx.mark_non_differentiable(entropies)
        ctx.set_materialize_grads(True)
        return logps, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, logp_grads, entropy_grads):  # type: ignore[no-untyped-def]
        hidden, weight, targets, logps, entropies = ctx.saved_tensors
        need_hidden, need_weight, *_ = ctx.needs_input_grad
        real = weight[: ctx.num_real_rows]
        hidden_grad = torch.zeros_like(hidden, dtype=logps.dtype) if need_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=logps.dtype) if need_weight else None
        # |p (log p + H)| <= 1 + H: stored gradients are 1 at most, times the dtype's scale.
        bounds = logp_grads.abs() + entropy_grads.abs() * (1 + entropies)
        largest = torch.nn.functional.pad(bounds, (0, 1)).max()
        largest = largest.where(largest > 0, 1.0)
        scale = storage_scale(hidden.dtype) / largest
        for index in cut_chunks(torch.arange(len(targets), device=targets.device), real):
            rows, num_tokens = fill_chunk(index, hidden), len(index)
            states, wanted = hidden[rows], targets[rows]
            factors = torch.stack([logp_grads[rows], entropy_grads[rows]]) * scale
            factors[:, num_tokens:] = 0
            # Overwritten, so that another backward through the same graph computes them again.
            logits = ctx.kept.pop(0) if ctx.kept else multiply(states, real.T)
            grads, at_target = _logit_gradients(
                logits, wanted, logps[rows], entropies[rows], factors,
                ctx.temperature, hidden.dtype,
            )  # fmt: skip
            if hidden_grad is not None:
                mixed = mix_rows(grads, real).addcmul_(at_target, real[wanted])
                hidden_grad[index] = mixed[:num_tokens]
            if weight_grad is not None:
                add_mixed_rows(weight_grad, grads, states)
                weight_grad.index_put_((wanted,), at_target * states, accumulate=True)
            del grads, logits
        undone = 1 / (scale * ctx.temperature)
        results = [scale_gradient(x, undone, hidden.dtype) for x in (hidden_grad, weight_grad)]
        return *results, None, None, None, None, None


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities of ``logits [t, v]``, wide."""
    scaled = logits.to(wide_dtype(logits.dtype), copy=True).div_(temperature)
    return scaled.sub_(scaled.logsumexp(1, keepdim=True))


def _logit_gradients(
    logits: Tensor,
    targets: Tensor,
    logps: Tensor,
    entropies: Tensor,
    factors: Tensor,
    temperature: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the scaled logits, apart from the targets' own.

    With z the logits over the temperature: d logp_t / dz_j = 1{j = t} - p_j, and for the entropy
    dH / dz_j = -p_j (log p_j + H). The target's own is most of the gradient: it is kept in fp32,
    where low precision would round it.

    Args:
        logits: ``[t, v]``, overwritten.
        targets: ``[t]``.
        logps: ``[t]`` of the targets.
        entropies: ``[t]``; 0 where no entropy has a gradient.
        factors: ``[2, t]`` incoming gradients of logps and entropies, scaled for ``dtype``.
        temperature: as in forward.
        dtype: of the result.

    Returns:
        ``[t, v]`` in ``dtype``, 0 at the targets, and ``[t, 1]``, wide: the targets' own.
    """
    grads = logits if logits.dtype == dtype else torch.empty_like(logits, dtype=dtype)
    of_logps, of_entropies = factors[:, :, None]
    for tile in cut_tiles(logits):
        wanted = targets[tile, None]
        every = logits[tile].to(logps.dtype).div_(temperature)  # a view where it is wide already
        every -= every.gather(1, wanted) - logps[tile, None]
        inner = every.add(entropies[tile, None]).mul_(of_entropies[tile]).add_(of_logps[tile])
        grads[tile] = every.exp_().mul_(inner).neg_().scatter_(1, wanted, 0.0)
    to_logps, to_entropies = factors
    own = -torch.expm1(logps) * to_logps - logps.exp() * (logps + entropies) * to_entropies
    return grads, own[:, None]
