"""From what was written and how it scored to what is learnt: advantages and returns.

All ranks hold the experience of all samples and compute the same figures of it, so that whitening,
statistics and the dealing to minibatches do not depend on how many ranks there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.errors import NumericsError
from trainer.losses.advantages import (
    generalized_advantages,
    group_advantages,
    leave_one_out_advantages,
    mean_and_variance,
    moments,
    sum_by_sample,
    token_rewards,
    whiten,
)
from trainer.losses.ppo import KL_ESTIMATORS
from trainer.rollout.answer_rows import Sample

ROUNDING = 1e-7  # of a number, as a share of it: reward models compute in fp32
Advantage = Literal["gae", "grpo", "rloo"]


@dataclass(frozen=True)
class KlConfig:
    """The price of straying from the reference."""

    coef: float = 0.05  # price of a nat at the start
    target: float | None = None  # nats a response that the price is steered to; null = fixed price
    horizon: int = 10_000  # responses over which the price moves by a fifth at most
    estimator: Literal["k1", "k3"] = "k1"  # in the reward; grpo has k3 in the loss

    def problems(self) -> list[str]:
        """Return values that make no sense."""
        rules = [
            (self.coef >= 0, "coef", "0 (off) or more"),
            (self.target is None or self.target > 0, "target", "null (fixed) or more than 0"),
            (self.horizon >= 1, "horizon", "1 or more"),
        ]
        found = [
            f"{key}={vars(self)[key]!r}: expected {expected}"
            for good, key, expected in rules
            if not good
        ]
        if self.target is not None and not self.coef:
            found.append("coef=0 stays 0, whatever the target; give a price to start with")
        return found


@dataclass(frozen=True)
class ScoreConfig:
    """What a response is paid, given its rewards."""

    scale: bool = False  # divide rewards by their standard deviation over the run so far
    clip: float = 0.0  # largest size of a (scaled) reward; 0 = any
    missing_eos_penalty: float = 0.0  # subtracted where a response was cut off at its limit

    def problems(self) -> list[str]:
        """Return values that make no sense."""
        return [
            f"{key}={vars(self)[key]!r}: expected 0 (off) or more"
            for key in ("clip", "missing_eos_penalty")
            if vars(self)[key] < 0
        ]


@dataclass(frozen=True)
class Shaping:
    """How advantages are made of scores.

    Attributes:
        advantage: ``gae`` (a critic), ``grpo`` or ``rloo`` (a group of responses to each prompt).
        group_size: responses to a prompt.
        kl_estimator: ``k1`` or ``k3``, of the divergence in the reward.
        gamma: gae: discount of a token.
        lam: gae: 0 trusts the critic, 1 the rewards.
    """

    advantage: Advantage
    group_size: int = 1
    kl_estimator: str = "k1"
    gamma: float = 1.0
    lam: float = 0.95


@dataclass(frozen=True)
class Figures:
    """What the models say of the samples, token by token: n tokens of all responses in a row.

    Attributes:
        lengths: ``[samples]`` tokens of each response.
        old_logps: ``[n]`` of the policy that wrote them.
        reference_logps: ``[n]`` of the frozen one.
        values: ``[n]`` of the critic, before each token; None without one.
        entropies: ``[n]`` of the policy's distributions.
    """

    lengths: Tensor
    old_logps: Tensor
    reference_logps: Tensor
    values: Tensor | None
    entropies: Tensor

    @property
    def offsets(self) -> list[int]:
        """Where each response begins in ``[n]``, and where the last one ends."""
        return [0, *self.lengths.cumsum(0).tolist()]

    def sample_kl(self) -> Tensor:
        """Return each response's divergence from the reference, by k1: ``[samples]`` nats."""
        return sum_by_sample(self.old_logps - self.reference_logps, self.lengths)


@dataclass(frozen=True)
class Experience:
    """What a step learns from.

    Attributes:
        samples: prompts and responses.
        figures: of the models.
        advantages: ``[n]``.
        returns: ``[n]`` what the critic is to learn; None without one.
    """

    samples: Sequence[Sample]
    figures: Figures
    advantages: Tensor
    returns: Tensor | None

    def places(self, numbers: Sequence[int]) -> Tensor:
        """Return where the tokens of some samples' responses are in ``[n]``, in their order."""
        offsets = self.figures.offsets
        spans = [torch.arange(offsets[number], offsets[number + 1]) for number in numbers]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)

    def num_targets(self, numbers: Sequence[int]) -> int:
        """Return the response tokens of some samples."""
        return sum(len(self.samples[number].response) for number in numbers)


def refuse_broken_figures(figures: Figures) -> None:
    """Refuse figures that nothing can be learnt from; every rank has the same.

    Raises:
        NumericsError: naming the model, and the responses in the order of the step.
    """
    says = {
        "the policy's log-probabilities": figures.old_logps,
        "the reference's log-probabilities": figures.reference_logps,
        "the critic's values": figures.values,
    }
    for what, values in says.items():
        if values is None or bool(values.isfinite().all()):
            continue
        of = torch.arange(len(figures.lengths)).repeat_interleave(figures.lengths)
        samples = of[~values.isfinite()].unique().tolist()
        raise NumericsError(
            f"{what} are not finite for {len(samples)} of {len(figures.lengths)} responses of the "
            f"step (the first: {samples[:8]}); its weights are damaged, or overflow in this "
            "precision (engine.precision)"
        )


def make_experience(
    samples: Sequence[Sample], scores: Tensor, figures: Figures, shaping: Shaping, kl_coef: float
) -> Experience:
    """Return samples with their advantages.

    Args:
        samples: a prompt's responses one after the other.
        scores: ``[samples]``.
        figures: of the models.
        shaping: estimator and its parameters.
        kl_coef: price of the divergence in the reward; with grpo it is in the loss instead.
    """
    lengths = figures.lengths
    kl = KL_ESTIMATORS[shaping.kl_estimator](figures.old_logps, figures.reference_logps)
    if shaping.advantage == "gae":
        assert figures.values is not None
        rewards = token_rewards(scores, kl, lengths, kl_coef)
        advantages, returns = generalized_advantages(
            rewards, figures.values, lengths, shaping.gamma, shaping.lam
        )
        white = whiten(advantages, *mean_and_variance(moments(advantages)))
        return Experience(samples, figures, white, returns)
    if shaping.advantage == "grpo":
        by_sample = group_advantages(scores.double(), shaping.group_size)
    else:
        paid = scores.double() - kl_coef * sum_by_sample(kl, lengths)
        by_sample = leave_one_out_advantages(paid, shaping.group_size)
    return Experience(samples, figures, by_sample.float().repeat_interleave(lengths), None)


@dataclass
class RewardStatistics:
    """Mean and deviation of all rewards of a run so far (Chan, Golub & LeVeque 1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # summed squared distances from the mean

    def update(self, rewards: Tensor) -> None:
        """Take in ``rewards`` ``[samples]``."""
        exact = rewards.double()
        count, mean = len(exact), float(exact.mean())
        distance, total = mean - self.mean, self.count + count
        self.squares += float((exact - mean).square().sum())
        self.squares += distance**2 * self.count * count / total
        self.mean += distance * count / total
        self.count = total

    @property
    def deviation(self) -> float:
        """The standard deviation; 1 where there is none yet, or only what rounding makes."""
        variance = self.squares / (self.count - 1) if self.count > 1 else 0.0
        deviation = math.sqrt(variance)
        return deviation if deviation > ROUNDING * abs(self.mean) else 1.0


def shape_scores(rewards: Tensor, stopped: Tensor, deviation: float, config: ScoreConfig) -> Tensor:
    """Return what responses are paid: rewards scaled, clipped, less for those that did not end.

    Args:
        rewards: ``[samples]``.
        stopped: ``[samples]`` bool, whether a response ended by itself.
        deviation: of the run's rewards so far.
        config: what of this is done.
    """
    scores = rewards.double() / (deviation if config.scale else 1.0)
    if config.clip:
        scores = scores.clamp(-config.clip, config.clip)
    return scores - config.missing_eos_penalty * (~stopped).double()
