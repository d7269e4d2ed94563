"""From rewards to advantages, for responses of uneven length.

Tokens of all responses lie one after the other in one dimension, ``[n]``; ``lengths`` ``[samples]``
says where each response ends. There is no padding that a mask could forget.
"""

from __future__ import annotations

import torch
from torch import Tensor

WHITEN_EPSILON = 1e-8
GROUP_EPSILON = 1e-4  # beside the deviation of a group: rewards equal but for rounding stay small


def token_rewards(scores: Tensor, kl: Tensor, lengths: Tensor, kl_coef: float) -> Tensor:
    """Return each token's reward: ``-kl_coef * kl``, and the score at the last token alone.

    Eq. 2 of arXiv:1909.08593, with the divergence paid where it arises.

    Args:
        scores: ``[samples]`` of whole responses.
        kl: ``[n]`` estimate at each token, nats.
        lengths: ``[samples]`` tokens of each response, 1 or more.
        kl_coef: price of a nat.

    Returns:
        ``[n]``.
    """
    rewards = -kl_coef * kl
    rewards[lengths.cumsum(0) - 1] += scores.to(rewards.dtype)
    return rewards


def generalized_advantages(
    rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns; a response ends the episode, so nothing follows it.

    Generalised advantage estimation, eq. 11, 12 and 16 of arXiv:1506.02438.

    Args:
        rewards: ``[n]``.
        values: ``[n]`` the critic's, before each token.
        lengths: ``[samples]`` tokens of each response, 1 or more.
        gamma: discount of a token.
        lam: 0 trusts the critic, 1 the rewards.

    Returns:
        advantages ``[n]``, returns ``[n]`` (what the critic is to learn).
    """
    is_real = mask_of(lengths)
    padded = rewards.new_zeros(2, *is_real.shape)
    padded[0][is_real], padded[1][is_real] = rewards, values
    following = torch.nn.functional.pad(padded[1][:, 1:], (0, 1))
    deltas = padded[0] + gamma * following - padded[1]
    advantages = torch.zeros_like(deltas)
    running = deltas.new_zeros(len(lengths))
    # Beyond a response's end rewards and values are 0, and so are the sums that reach it from there
    for place in range(deltas.shape[1] - 1, -1, -1):
        running = (deltas[:, place] + gamma * lam * running) * is_real[:, place]
        advantages[:, place] = running
    flat = advantages[is_real]
    return flat, flat + values


def group_advantages(scores: Tensor, group_size: int) -> Tensor:
    """Return each score's distance from its group's mean, in the group's standard deviations.

    GRPO, section 4.1.2 of arXiv:2402.03300. A group whose scores are all equal teaches nothing.

    Args:
        scores: ``[groups * group_size]``, a prompt's responses one after the other.
        group_size: responses to a prompt, 2 or more.

    Returns:
        ``[groups * group_size]``.
    """
    groups = scores.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    advantages = centred / (groups.std(1, keepdim=True) + GROUP_EPSILON)
    return advantages.masked_fill(is_flat(scores, group_size)[:, None], 0.0).flatten()


def leave_one_out_advantages(scores: Tensor, group_size: int) -> Tensor:
    """Return each score minus the mean of the others in its group (RLOO, arXiv:2402.14740).

    Args:
        scores: ``[groups * group_size]``, a prompt's responses one after the other.
        group_size: responses to a prompt, 2 or more.

    Returns:
        ``[groups * group_size]``.
    """
    groups = scores.view(-1, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    equal = is_flat(scores, group_size)[:, None]
    return (groups - others).masked_fill(equal, 0.0).flatten()


def is_flat(scores: Tensor, group_size: int) -> Tensor:
    """Return which groups have equal scores only: ``[groups * group_size] -> [groups]`` bool."""
    groups = scores.view(-1, group_size)
    return groups.amax(1) == groups.amin(1)


def moments(values: Tensor) -> Tensor:
    """Return sum, sum of squares and number of ``values`` ``[n]`` as float64 ``[3]``.

    Those of several ranks add up to those of all.
    """
    exact = values.double()
    return torch.stack([exact.sum(), exact.square().sum(), exact.new_tensor(len(exact))])


def mean_and_variance(sums: Tensor) -> tuple[float, float]:
    """Return mean and unbiased variance from ``moments`` ``[3]``; 0 where there is none."""
    total, squares, count = sums.tolist()
    mean = total / max(count, 1)
    return mean, max(0.0, squares - count * mean**2) / max(count - 1, 1)


def whiten(values: Tensor, mean: float, variance: float) -> Tensor:
    """Return ``values`` ``[n]`` with mean 0 and variance 1 over all that the moments are of."""
    return (values - mean) / (variance + WHITEN_EPSILON) ** 0.5


def explained_variance_sums(values: Tensor, returns: Tensor) -> Tensor:
    """Return what ``explained_variance`` needs of ``values`` and ``returns`` ``[n]``: ``[5]``."""
    return torch.cat([moments(returns), moments(returns - values)[:2]])


def explained_variance(sums: Tensor) -> float:
    """Return the share of the returns' variance that the values explain: 1 all, 0 none, NaN = flat.

    Args:
        sums: ``[5]`` of ``explained_variance_sums``, added over ranks.
    """
    total, squares, count, error, error_squares = sums.tolist()
    spread = squares - total**2 / max(count, 1)
    rest = error_squares - error**2 / max(count, 1)
    return 1 - rest / spread if spread > 0 else float("nan")


def mask_of(lengths: Tensor) -> Tensor:
    """Return ``[samples, longest]`` bool, true at the first ``lengths`` ``[samples]`` places."""
    places = torch.arange(int(lengths.max()), device=lengths.device)
    return places < lengths[:, None]


def sum_by_sample(values: Tensor, lengths: Tensor) -> Tensor:
    """Return the sum over each response: ``[n], [samples] -> [samples]``, in float64."""
    owners = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    sums = torch.zeros(len(lengths), dtype=torch.float64, device=values.device)
    return sums.index_add_(0, owners, values.double())
