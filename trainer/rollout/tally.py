"""The figures of a step's rollout, and what in it is worth a warning."""

from __future__ import annotations

import math

from torch import Tensor

from trainer.losses.advantages import (
    explained_variance,
    explained_variance_sums,
    is_flat,
)
from trainer.metrics.bag import MetricBag
from trainer.rollout.collection import Rollout
from trainer.rollout.experience import Experience, Figures


def count_rollout(rollout: Rollout, rewards: Tensor, figures: Figures) -> dict[str, float]:
    """Return the means over a rollout.

    Args:
        rollout: of all ranks.
        rewards: ``[samples]``.
        figures: of the models.
    """
    return {
        "reward": float(rewards.mean()),
        "kl": float(figures.sample_kl().mean()),
        "response_length": float(figures.lengths.double().mean()),
        "eos_share": float(rollout.stopped.double().mean()),
        "entropy": float(figures.entropies.double().mean()),
    }


def tally(
    bag: MetricBag, rollout: Rollout, rewards: Tensor, scores: Tensor, experience: Experience
) -> None:
    """Add a step's means to ``bag``; every rank adds the same.

    Args:
        bag: of the run.
        rollout: of all ranks.
        rewards: ``[samples]`` as the reward models and rules gave them.
        scores: ``[samples]`` as they were paid.
        experience: made of them.
    """
    figures = experience.figures
    for name, value in count_rollout(rollout, rewards, figures).items():
        bag.add(name, value)
    bag.add("score", float(scores.mean()))
    if figures.values is not None and experience.returns is not None:
        add_explained_variance(bag, figures.values, experience.returns)


def add_explained_variance(bag: MetricBag, values: Tensor, returns: Tensor) -> None:
    """Add what of a step's ``returns`` ``[n]`` its ``values`` ``[n]`` explain.

    A step whose returns are all equal has none, and weighs nothing in the mean of its window.
    """
    share = explained_variance(explained_variance_sums(values, returns))
    has_share = not math.isnan(share)
    bag.add("explained_variance", share if has_share else 0.0, float(has_share))


def spread(rewards: Tensor) -> dict[str, float]:
    """Return deviation and extremes of a step's rewards ``[samples]``."""
    return {
        "reward_std": float(rewards.std(correction=0)),
        "reward_min": float(rewards.min()),
        "reward_max": float(rewards.max()),
    }


def flat_share(scores: Tensor, group_size: int) -> float:
    """Return the share of prompts whose responses all have one score ``[samples]``."""
    return float(is_flat(scores, group_size).double().mean())


def find_oddities(rollout: Rollout, scores: Tensor, group_size: int) -> dict[str, str]:
    """Return by kind what is wrong with a step that goes on all the same.

    Args:
        rollout: of all ranks.
        scores: ``[samples]`` as they were paid.
        group_size: responses to a prompt that are compared with each other; 1 = none are.
    """
    oddities = {}
    lengths = [len(response.ids) for response in rollout.responses]
    if len(lengths) > 1 and len(set(lengths)) == 1:
        cause = (
            "every one ended there by itself"
            if bool(rollout.stopped.all())
            else "none of them ended before stage.sampling.max_new_tokens: raise it, set "
            "stage.score.missing_eos_penalty, or start from a model tuned with this template"
        )
        oddities["length"] = f"all {len(lengths)} responses have {lengths[0]} tokens; {cause}"
    num_flat = int(is_flat(scores, group_size).sum()) if group_size > 1 else 0
    if num_flat:
        oddities["flat"] = (
            f"the responses to {num_flat} of {len(scores) // group_size} prompts have equal "
            "rewards and teach nothing (flat_share counts them); a finer reward, a higher "
            "stage.sampling.temperature or more stage.responses_per_prompt tells them apart"
        )
    return oddities
