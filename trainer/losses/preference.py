"""Losses on preferred and rejected answers, by name.

Each is a pure function of log-probabilities and of its own hyperparameters (its keyword
arguments), and returns one loss a pair: a caller sums and divides by the global number of pairs.
``@preference_loss`` puts it into ``LOSSES`` under the function's name, which is what a
configuration calls it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class PairLogps(NamedTuple):
    """What pairs of answers are worth to the policy and to the reference.

    Attributes:
        chosen: ``[pairs]`` log-probability (nats) of each preferred answer under the policy: the
            sum over its tokens.
        rejected: ``[pairs]`` of each rejected one.
        reference_chosen: ``[pairs]`` under the reference; zeros where a loss needs none.
        reference_rejected: ``[pairs]``
        chosen_lengths: ``[pairs]`` tokens that the sum is over.
        rejected_lengths: ``[pairs]``
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor

    @property
    def difference(self) -> Tensor:
        """Return Δ ``[pairs]``: how much more the policy prefers each pair than the reference."""
        policy = self.chosen - self.rejected
        return policy - (self.reference_chosen - self.reference_rejected)

    def per_token(self) -> PairLogps:
        """Return means over the answers' tokens in the place of sums."""
        return self._replace(
            chosen=self.chosen / self.chosen_lengths,
            rejected=self.rejected / self.rejected_lengths,
            reference_chosen=self.reference_chosen / self.chosen_lengths,
            reference_rejected=self.reference_rejected / self.rejected_lengths,
        )


class AnswerLogps(NamedTuple):
    """What single answers, each liked or not, are worth to the policy and to the reference.

    Attributes:
        policy: ``[answers]`` log-probability (nats) of each answer: the sum over its tokens.
        reference: ``[answers]``
        sides: ``[answers]`` 1 for a desirable answer, -1 for an undesirable one.
        baseline: ``[]`` what a mean answer's log-ratio is; ``kl_baseline`` makes it.
    """

    policy: Tensor
    reference: Tensor
    sides: Tensor
    baseline: Tensor


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss and what it wants to be given.

    Attributes:
        function: ``(PairLogps, **hyperparameters) -> [pairs]``, or of ``AnswerLogps``.
        uses_reference: it compares with the log-probabilities of a reference model.
        is_paired: it takes ``PairLogps``; else ``AnswerLogps``.
    """

    function: Callable[..., Tensor]
    uses_reference: bool
    is_paired: bool

    @property
    def hyperparameters(self) -> list[str]:
        """Return the names of the loss's keyword arguments."""
        kinds = inspect.signature(self.function).parameters.values()
        return [each.name for each in kinds if each.kind is inspect.Parameter.KEYWORD_ONLY]


LOSSES: dict[str, PreferenceLoss] = {}
LossFunction = Callable[..., Tensor]


def preference_loss(
    *, uses_reference: bool = True, is_paired: bool = True
) -> Callable[[LossFunction], LossFunction]:
    """Register a loss under its function's name."""

    def register(function: LossFunction) -> LossFunction:
        LOSSES[function.__name__] = PreferenceLoss(function, uses_reference, is_paired)
        return function

    return register


@preference_loss()
def sigmoid(logps: PairLogps, *, beta: float) -> Tensor:
    """Return DPO's loss (arXiv:2305.18290, eq. 7). -> [pairs]"""
    return -logsigmoid(beta * logps.difference)


@preference_loss()
def cdpo(logps: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    """Return DPO's loss when a share of the labels is swapped. -> [pairs]

    Conservative DPO (E. Mitchell 2023, "A note on DPO with noisy preferences", eq. 3).
    """
    logits = beta * logps.difference
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


@preference_loss()
def robust(logps: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    """Return the unbiased estimate of DPO's loss under swapped labels. -> [pairs]

    Robust DPO (arXiv:2403.00409, eq. 12); the share of swapped labels is below a half.
    """
    logits = beta * logps.difference
    kept = -(1 - label_smoothing) * logsigmoid(logits)
    return (kept + label_smoothing * logsigmoid(-logits)) / (1 - 2 * label_smoothing)


@preference_loss()
def hinge(logps: PairLogps, *, beta: float) -> Tensor:
    """Return the hinge loss, zero from a margin of 1 on (SLiC, arXiv:2305.10425). -> [pairs]"""
    return torch.relu(1 - beta * logps.difference)


@preference_loss()
def ipo(logps: PairLogps, *, beta: float) -> Tensor:
    """Return the squared distance of Δ, a token's mean, from 1/(2β). -> [pairs]

    IPO (arXiv:2310.12036, eq. 17; β is the paper's τ). Log-probabilities are averaged over each
    answer's tokens, as its authors do, so that long answers do not outweigh.
    """
    return (logps.per_token().difference - 1 / (2 * beta)) ** 2


@preference_loss(uses_reference=False)
def simpo(logps: PairLogps, *, beta: float, gamma: float) -> Tensor:
    """Return the loss of the difference of mean token log-probabilities. -> [pairs]

    SimPO (arXiv:2405.14734, eq. 6); ``gamma`` is the reward margin that is asked for.
    """
    means = logps.per_token()
    return -logsigmoid(beta * (means.chosen - means.rejected) - gamma)


@preference_loss(uses_reference=False)
def orpo(logps: PairLogps, *, odds_weight: float) -> Tensor:
    """Return the chosen answer's mean NLL and the weighted loss of the odds ratio. -> [pairs]

    ORPO (arXiv:2403.07691, eq. 6 and 7; ``odds_weight`` is its λ).
    """
    means = logps.per_token()
    log_odds = (means.chosen - log1m_exp(means.chosen)) - (
        means.rejected - log1m_exp(means.rejected)
    )
    return -means.chosen - odds_weight * logsigmoid(log_odds)


@preference_loss(is_paired=False)
def kto(
    logps: AnswerLogps, *, beta: float, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """Return the loss of single answers against the baseline. -> [answers]

    KTO (arXiv:2402.01306, eq. 8).
    """
    logits = beta * (logps.policy - logps.reference - logps.baseline) * logps.sides
    losses = 1 - torch.sigmoid(logits)
    return torch.where(logps.sides > 0, desirable_weight * losses, undesirable_weight * losses)


def kl_baseline(total: Tensor, count: Tensor) -> Tensor:
    """Return KTO's z0: mismatched answers' mean log-ratio, at least 0, without gradient. -> []

    Args:
        total: ``[]`` sum of policy minus reference log-probabilities of answers to other prompts,
            over the whole global batch (arXiv:2402.01306, section 4.1).
        count: ``[]`` of such answers; with none the baseline is 0.
    """
    return (total / count.clamp(min=1)).clamp(min=0).detach()


def chosen_nll(logps: PairLogps) -> Tensor:
    """Return the chosen answers' mean NLL a token, which keeps them likely. -> [pairs]

    The term that RPO adds to DPO's loss (arXiv:2404.19733, eq. 1).
    """
    return -logps.chosen / logps.chosen_lengths


def log1m_exp(logps: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x <= 0, exact at both ends (Mächler 2012, eq. 7).

    A probability that rounds to 1 counts as the largest below it; log-odds stay finite.
    """
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    is_near_one = logps > -0.6931472
    near = torch.log(-torch.expm1(torch.where(is_near_one, logps, -1.0)))
    return torch.where(is_near_one, near, torch.log1p(-torch.exp(logps)))
