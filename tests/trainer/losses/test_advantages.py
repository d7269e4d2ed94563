"""Advantages against plain loops over single responses, in float64."""

from __future__ import annotations

import pytest
import torch

from trainer.losses.advantages import (
    explained_variance,
    explained_variance_sums,
    generalized_advantages,
    group_advantages,
    is_flat,
    leave_one_out_advantages,
    mean_and_variance,
    moments,
    sum_by_sample,
    token_rewards,
    whiten,
)

LENGTHS = [3, 1, 6, 2]


@pytest.fixture
def lengths() -> torch.Tensor:
    return torch.tensor(LENGTHS)


def draw(seed: int, num: int = sum(LENGTHS)) -> torch.Tensor:
    return torch.randn(num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_score_falls_on_the_last_token_only() -> None:
    kl = torch.tensor([0.1, 0.2, 0.3, 0.4])
    rewards = token_rewards(torch.tensor([5.0, -1.0]), kl, torch.tensor([3, 1]), 0.5)
    torch.testing.assert_close(rewards, torch.tensor([-0.05, -0.1, 5 - 0.15, -1 - 0.2]))


def test_advantages_by_hand() -> None:
    # One response of two tokens: d_1 = 2 - 1 = 1, d_0 = 0 + 0.5 * 1 - 3 = -2.5, A_0 = -2.5 + 0.25
    advantages, returns = generalized_advantages(
        torch.tensor([0.0, 2.0]), torch.tensor([3.0, 1.0]), torch.tensor([2]), 0.5, 0.5
    )
    torch.testing.assert_close(advantages, torch.tensor([-2.25, 1.0]))
    torch.testing.assert_close(returns, torch.tensor([0.75, 2.0]))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_equal_the_double_sum(lengths: torch.Tensor, gamma: float, lam: float) -> None:
    rewards, values = draw(0), draw(1)
    advantages, returns = generalized_advantages(rewards, values, lengths, gamma, lam)
    expected, start = [], 0
    for length in LENGTHS:
        r, v = rewards[start : start + length].tolist(), values[start : start + length].tolist()
        deltas = [
            r[t] + gamma * (v[t + 1] if t + 1 < length else 0.0) - v[t] for t in range(length)
        ]
        for t in range(length):
            expected.append(sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length)))
        start += length
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(returns, advantages + values)


def test_responses_do_not_reach_into_each_other(lengths: torch.Tensor) -> None:
    rewards, values = draw(0), draw(1)
    before, _ = generalized_advantages(rewards, values, lengths, 1.0, 0.95)
    rewards[4:10] += 100.0  # the third response
    after, _ = generalized_advantages(rewards, values, lengths, 1.0, 0.95)
    changed = (before != after).tolist()
    assert changed == [False] * 4 + [True] * 6 + [False] * 2


def test_groups_are_centred_and_scaled() -> None:
    scores = torch.tensor([1.0, 3.0, 5.0, 2.0, 2.0, 2.0], dtype=torch.float64)
    advantages = group_advantages(scores, 3)
    one = 2 / (2 + 1e-4)  # distance 2, sample deviation 2
    expected = torch.tensor([-one, 0, one, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(advantages, expected)
    assert is_flat(scores, 3).tolist() == [False, True]


def test_equal_scores_teach_nothing_even_when_their_mean_is_rounded() -> None:
    scores = torch.full((7,), 0.1)
    assert not group_advantages(scores, 7).any()
    assert not leave_one_out_advantages(scores, 7).any()


def test_leave_one_out_equals_the_mean_of_the_others() -> None:
    scores = draw(2, 12)
    expected = []
    for at in range(12):
        group = at // 4 * 4
        others = [float(scores[k]) for k in range(group, group + 4) if k != at]
        expected.append(float(scores[at]) - sum(others) / 3)
    torch.testing.assert_close(
        leave_one_out_advantages(scores, 4), torch.tensor(expected, dtype=torch.float64)
    )


def test_whitening_is_over_all_ranks_shares() -> None:
    values = draw(3, 50) * 4 + 7
    shares = moments(values[:13]) + moments(values[13:])
    mean, variance = mean_and_variance(shares)
    white = torch.cat([whiten(values[:13], mean, variance), whiten(values[13:], mean, variance)])
    expected = (values - values.mean()) / (values.var() + 1e-8).sqrt()
    torch.testing.assert_close(white, expected)


def test_whitening_equals_trl() -> None:
    values = torch.tensor([1.0, 2.0, -0.5, 0.25, 3.0, -1.5], dtype=torch.float64)
    # What TRL 0.24.0's masked_whiten makes of them as three padded rows of 3, 1 and 2 tokens.
    expected = [
        *[0.17716125954409642, 0.7845712922667127, -0.7339537895398283],
        *[-0.27839626499786585, 1.3919813249893291, -1.3413638222624447],
    ]
    found = whiten(values, *mean_and_variance(moments(values)))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_whitening_of_equal_values_is_zero() -> None:
    values = torch.full((3,), 2.5)
    assert not whiten(values, *mean_and_variance(moments(values))).any()


def test_explained_variance() -> None:
    returns, noise = draw(4, 40), draw(5, 40)
    values = returns + 0.5 * noise
    shares = [explained_variance_sums(values[at], returns[at]) for at in (slice(9), slice(9, 40))]
    expected = 1 - (returns - values).var() / returns.var()
    assert explained_variance(shares[0] + shares[1]) == pytest.approx(float(expected))
    assert explained_variance(explained_variance_sums(returns, returns)) == 1.0
    flat = torch.ones(4)
    assert str(explained_variance(explained_variance_sums(flat, flat))) == "nan"


def test_sums_by_sample(lengths: torch.Tensor) -> None:
    values = torch.arange(12.0)
    assert sum_by_sample(values, lengths).tolist() == [3, 3, 39, 21]
