"""A preference loss with its hyperparameters, and what a policy's answers are worth by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.losses.preference import LOSSES, AnswerLogps, PairLogps, PreferenceLoss, chosen_nll


class Answers(NamedTuple):
    """Answers in any order in which the two of a pair follow each other, the chosen one first.

    Attributes:
        policy: ``[n]`` log-probability of each answer (nats): the sum over its tokens.
        reference: ``[n]`` under the reference; zeros where the loss needs none.
        lengths: ``[n]`` tokens that the sums are over.
        sides: ``[n]`` 1 chosen or desirable, -1 rejected or undesirable.
    """

    policy: Tensor
    reference: Tensor
    lengths: Tensor
    sides: Tensor


@dataclass(frozen=True)
class Objective:
    """What a stage minimises.

    Attributes:
        name: of the loss in ``LOSSES``.
        hyperparameters: its keyword arguments.
        nll_weight: of the chosen answers' mean NLL a token, added to the loss of pairs.
    """

    name: str
    hyperparameters: Mapping[str, float]
    nll_weight: float = 0.0

    @property
    def kind(self) -> PreferenceLoss:
        """Return what the loss wants to be given."""
        return LOSSES[self.name]

    def num_losses(self, sides: Tensor) -> int:
        """Return how many losses there are of answers: pairs, or single answers."""
        return int((sides > 0).sum()) if self.kind.is_paired else len(sides)

    def losses(self, answers: Answers, baseline: Tensor) -> Tensor:
        """Return the loss of each pair, or of each answer. -> [pairs or n]

        Args:
            answers: of pairs, or single ones.
            baseline: ``[]`` KTO's z0; losses of pairs do not look at it.
        """
        if not self.kind.is_paired:
            single = AnswerLogps(answers.policy, answers.reference, answers.sides, baseline)
            return self.kind.function(single, **self.hyperparameters)
        pairs = pair_up(answers)
        losses = self.kind.function(pairs, **self.hyperparameters)
        return losses + self.nll_weight * chosen_nll(pairs) if self.nll_weight else losses

    def rewards(self, answers: Answers) -> Tensor:
        """Return what each answer is worth by the loss. -> [n]

        β·log(policy/reference) (arXiv:2305.18290, eq. 5 without the prompt's constant); without a
        reference β times the mean log-probability of a token (arXiv:2405.14734, eq. 4).
        """
        beta = self.hyperparameters.get("beta", 1.0)
        if self.kind.uses_reference:
            return beta * (answers.policy - answers.reference)
        return beta * answers.policy / answers.lengths

    @torch.no_grad()
    def figures(self, answers: Answers, baseline: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return sums to be logged and what each is to be divided by, by name.

        ``kl`` is the mean of log(reference/policy) over the data's answers: an estimate of
        KL(reference ‖ policy) as far as the reference could have written them.
        """
        rewards, is_chosen = self.rewards(answers), answers.sides > 0
        sides = {"chosen": is_chosen, "rejected": ~is_chosen}
        figures = {}
        for name, inside in sides.items():
            num = inside.sum()
            figures[f"{name}_reward"] = rewards[inside].sum(), num
            figures[f"{name}_logps"] = answers.policy[inside].sum(), num
            figures[f"{name}_length"] = answers.lengths[inside].sum(), num
        if self.kind.uses_reference:
            num = torch.tensor(len(rewards))
            figures["kl"] = (answers.reference - answers.policy).sum(), num
        if self.kind.is_paired:
            margins = rewards[is_chosen] - rewards[~is_chosen]
            figures["margin"] = margins.sum(), is_chosen.sum()
        else:
            margins = (rewards - self.hyperparameters["beta"] * baseline) * answers.sides
            figures["baseline"] = baseline * len(margins), torch.tensor(len(margins))
        # Before the first step policy and reference are the same: chance, not always wrong.
        num_right = (margins > 0).sum() + 0.5 * (margins == 0).sum()
        figures["accuracy"] = num_right, torch.tensor(len(margins))
        return figures


def pair_up(answers: Answers) -> PairLogps:
    """Return answers as pairs: the i-th chosen one with the i-th rejected one."""
    is_chosen = answers.sides > 0
    values = [answers.policy, answers.reference, answers.lengths]
    (chosen, reference_chosen, chosen_lengths), (rejected, reference_rejected, rejected_lengths) = (
        [value[inside] for value in values] for inside in (is_chosen, ~is_chosen)
    )
    return PairLogps(
        chosen=chosen,
        rejected=rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
