"""Proximal policy optimisation: clipped losses, estimates of the KL divergence, its controllers."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_KL_ERROR = 0.2  # share of the target that one step of the controller heeds
# exp of more than this is no ratio or divergence but a token one of the two models rules out.
MAX_LOG_RATIO = 20.0


def policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Return the summed clipped surrogate and the number of tokens whose gradient it cut off.

    ``max(-A * ratio, -A * clip(ratio, 1 - e, 1 + e))``, eq. 7 of arXiv:1707.06347, negated.

    Args:
        logps: ``[n]`` of the policy that learns.
        old_logps: ``[n]`` of the policy that wrote the tokens.
        advantages: ``[n]``.
        clip_range: e.

    Returns:
        The sum ``[]``, and the clipped tokens ``[]``.
    """
    ratio = (logps - old_logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(plain, clipped).sum(), (clipped > plain).sum()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Return the summed squared error of the critic and the number of tokens it was clipped at.

    ``max((V - R)^2, (clip(V, V_old - e, V_old + e) - R)^2) / 2``, as in OpenAI's baselines: a value
    may not move further than e from where it was when the responses were scored.

    Args:
        values: ``[n]`` of the critic that learns.
        old_values: ``[n]`` when the responses were scored.
        returns: ``[n]`` what it is to learn.
        clip_range: e; 0 does not clip.

    Returns:
        The sum ``[]``, and the clipped tokens ``[]``.
    """
    plain = (values - returns).square()
    if not clip_range:
        return plain.sum() / 2, torch.zeros((), dtype=torch.int64, device=values.device)
    near = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    clipped = (near - returns).square()
    return torch.maximum(plain, clipped).sum() / 2, (clipped > plain).sum()


def kl_k1(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Return ``log p - log q`` at tokens drawn from p: unbiased, can be negative; all ``[n]``.

    The plain estimator of J. Schulman, "Approximating KL Divergence" (2020).
    """
    return logps - reference_logps


def kl_k3(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Return ``q/p - 1 - log(q/p)`` at tokens drawn from p: unbiased, never negative; all ``[n]``.

    The k3 estimator of the same note; eq. 4 of arXiv:2402.03300 has it in the loss.
    """
    # Only upwards, where exp grows: what the reference rules out costs as much as it is unlikely.
    log_ratio = (reference_logps - logps).clamp(max=MAX_LOG_RATIO)
    return log_ratio.expm1() - log_ratio


KL_ESTIMATORS = {"k1": kl_k1, "k3": kl_k3}


def adapt_kl_coef(
    kl_coef: float, kl: float, target: float, num_samples: int, horizon: float
) -> float:
    """Return the next price of KL: dearer when responses stray further than ``target``.

    Section 2.2 of arXiv:1909.08593: ``b * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon)``.

    Args:
        kl_coef: b, the price in this step.
        kl: mean divergence of this step's responses, nats a response.
        target: what it should be.
        num_samples: n, responses in this step.
        horizon: responses over which the price may change by a fifth; the larger, the slower.
    """
    error = min(max(kl / target - 1, -MAX_KL_ERROR), MAX_KL_ERROR)
    return kl_coef * (1 + error * num_samples / horizon)
