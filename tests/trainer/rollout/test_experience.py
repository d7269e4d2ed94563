"""Experience: what reaches the advantages, and the figures kept over a run."""

from __future__ import annotations

import pytest
import torch

from trainer.errors import NumericsError
from trainer.rollout.answer_rows import Sample
from trainer.rollout.experience import (
    Advantage,
    Figures,
    RewardStatistics,
    ScoreConfig,
    Shaping,
    make_experience,
    refuse_broken_figures,
    shape_scores,
)

LENGTHS = [2, 4, 1, 3]
SAMPLES = [Sample([1], [2] * length) for length in LENGTHS]


def make_figures(*, with_values: bool) -> Figures:
    generator = torch.Generator().manual_seed(0)
    old, reference, values = (torch.randn(sum(LENGTHS), generator=generator) for _ in range(3))
    return Figures(
        torch.tensor(LENGTHS), old, reference, values if with_values else None, torch.zeros(10)
    )


def test_gae_pays_the_divergence_by_token_and_whitens_over_all_tokens() -> None:
    figures = make_figures(with_values=True)
    scores = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    experience = make_experience(SAMPLES, scores, figures, Shaping("gae", lam=1.0), 0.1)
    assert experience.returns is not None and figures.values is not None
    kl = figures.old_logps - figures.reference_logps
    start = 0
    for score, length in zip(scores.tolist(), LENGTHS, strict=True):
        # With gamma = lam = 1 a return is all that is still to be paid.
        for at in range(length):
            left = score - 0.1 * float(kl[start + at : start + length].sum())
            assert float(experience.returns[start + at]) == pytest.approx(left, abs=1e-5)
        start += length
    raw = experience.returns - figures.values
    white = (raw - raw.mean()) / (raw.var() + 1e-8).sqrt()
    torch.testing.assert_close(experience.advantages, white)


@pytest.mark.parametrize("advantage", ["grpo", "rloo"])
def test_a_response_shares_one_advantage(advantage: Advantage) -> None:
    figures = make_figures(with_values=False)
    scores = torch.tensor([1.0, -1.0, 0.5, 2.0])
    shaping = Shaping(advantage, group_size=2)
    experience = make_experience(SAMPLES, scores, figures, shaping, 0.0)
    assert experience.returns is None
    by_sample = experience.advantages.split(LENGTHS)
    assert all(len(set(own.tolist())) == 1 for own in by_sample)
    assert [float(own[0]) > 0 for own in by_sample] == [True, False, False, True]
    assert float(by_sample[0][0] + by_sample[1][0]) == pytest.approx(0)


def test_rloo_pays_the_whole_divergence_grpo_none_of_it() -> None:
    figures, scores = make_figures(with_values=False), torch.zeros(4)
    grpo = make_experience(SAMPLES, scores, figures, Shaping("grpo", 2), 0.5)
    assert not grpo.advantages.any()
    rloo = make_experience(SAMPLES, scores, figures, Shaping("rloo", 2), 0.5)
    paid = -0.5 * figures.sample_kl()
    expected = torch.stack([paid[0] - paid[1], paid[1] - paid[0]]).float()
    torch.testing.assert_close(rloo.advantages[[0, 2]], expected)


def test_places_follow_the_order_of_the_samples() -> None:
    experience = make_experience(
        SAMPLES, torch.zeros(4), make_figures(with_values=True), Shaping("gae"), 0.0
    )
    assert experience.places([3, 0]).tolist() == [7, 8, 9, 0, 1]
    assert experience.places([]).tolist() == []
    assert experience.num_targets([3, 0]) == 5


def test_scores_are_scaled_then_clipped_then_penalised() -> None:
    rewards, stopped = torch.tensor([3.0, -9.0, 1.0]), torch.tensor([True, True, False])
    config = ScoreConfig(scale=True, clip=2.0, missing_eos_penalty=0.75)
    assert shape_scores(rewards, stopped, 3.0, config).tolist() == [1.0, -2.0, 1 / 3 - 0.75]
    assert shape_scores(rewards, stopped, 3.0, ScoreConfig()).tolist() == [3.0, -9.0, 1.0]


def test_statistics_of_parts_are_those_of_the_whole() -> None:
    rewards = torch.randn(100, generator=torch.Generator().manual_seed(0)) * 3 + 50
    statistics = RewardStatistics()
    assert statistics.deviation == 1.0
    for part in rewards.split([1, 30, 69]):
        statistics.update(part)
    assert statistics.count == 100
    assert statistics.mean == pytest.approx(float(rewards.mean()))
    assert statistics.deviation == pytest.approx(float(rewards.std()))


def test_equal_rewards_are_not_scaled_by_their_rounding() -> None:
    """The mean of three times 0.1 is not 0.1 in binary: the deviation would be 1.7e-17."""
    statistics = RewardStatistics()
    statistics.update(torch.full((3,), 0.1, dtype=torch.float64))
    assert statistics.squares > 0
    assert statistics.deviation == 1.0


def test_figures_that_are_not_finite_are_refused_with_the_model_and_the_responses() -> None:
    flat = torch.zeros(6)
    figures = Figures(torch.tensor([2, 3, 1]), flat, flat, flat.clone(), flat)
    refuse_broken_figures(figures)
    assert figures.values is not None
    figures.values[[3, 5]] = torch.tensor([float("nan"), float("inf")])
    expected = r"critic's values are not finite for 2 of 3 responses .*first: \[1, 2\]"
    with pytest.raises(NumericsError, match=expected):
        refuse_broken_figures(figures)
