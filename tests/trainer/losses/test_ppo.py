"""Losses of PPO by hand, by gradient, and against a plain reference with masks."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.losses.ppo import adapt_kl_coef, kl_k1, kl_k3, policy_loss, value_loss


def test_policy_loss_by_hand() -> None:
    # ratios 1.5, 1.5, 0.5, 0.5 against advantages of both signs; clip range 0.2
    logps = torch.tensor([1.5, 1.5, 0.5, 0.5]).log()
    loss, num_clipped = policy_loss(
        logps, torch.zeros(4), torch.tensor([2.0, -2.0, 2.0, -2.0]), 0.2
    )
    assert float(loss) == pytest.approx(-2.4 + 3.0 - 1.0 + 1.6)
    assert int(num_clipped) == 2


def test_clipped_tokens_have_no_gradient() -> None:
    logps = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0, 1.0]).log().requires_grad_()
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 1.0, -1.0])
    policy_loss(logps, torch.zeros(6), advantages, 0.2)[0].backward()
    assert logps.grad is not None
    # Descent makes good tokens likelier and bad ones rarer, where the ratio is not beyond its range
    assert logps.grad.sign().tolist() == [0, 1, -1, 0, -1, 1]


def test_policy_gradient_at_ratio_one_is_minus_the_advantage() -> None:
    logps = torch.randn(20, requires_grad=True)
    advantages = torch.randn(20)
    policy_loss(logps, logps.detach(), advantages, 0.2)[0].backward()
    torch.testing.assert_close(logps.grad, -advantages)


def test_value_loss_by_hand() -> None:
    values, old = torch.tensor([1.0, 1.0, 0.1]), torch.zeros(3)
    returns = torch.tensor([2.0, 0.0, 1.0])
    # clipped to 0.2: errors (1, 1.8), (1, 0.2), (0.9, 0.9); the larger counts
    loss, num_clipped = value_loss(values, old, returns, 0.2)
    assert float(loss) == pytest.approx((1.8**2 + 1 + 0.9**2) / 2)
    assert int(num_clipped) == 1
    plain, none = value_loss(values, old, returns, 0.0)
    assert float(plain) == pytest.approx((1 + 1 + 0.9**2) / 2)
    assert int(none) == 0


def test_losses_equal_a_padded_reference_with_masks() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (4, 9)
    mask = torch.arange(9) < torch.tensor([9, 1, 4, 6])[:, None]
    new, old, advantages, values, old_values, returns = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(6)
    )
    ratio = (new - old).exp()
    surrogate = torch.min(ratio * advantages, ratio.clamp(0.9, 1.1) * advantages)
    loss, _ = policy_loss(new[mask], old[mask], advantages[mask], 0.1)
    torch.testing.assert_close(loss, -(surrogate * mask).sum())
    errors = (values - returns) ** 2
    moved = old_values + (values - old_values).clamp(-0.1, 0.1)
    expected = 0.5 * (torch.max(errors, (moved - returns) ** 2) * mask).sum()
    torch.testing.assert_close(
        value_loss(values[mask], old_values[mask], returns[mask], 0.1)[0], expected
    )


def test_estimators_of_the_divergence_agree_with_it() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(8, generator=generator, dtype=torch.float64).log_softmax(0) for _ in "pq")
    exact = (p.exp() * (p - q)).sum()
    # the expectation over tokens drawn from p, in closed form
    for estimate in (kl_k1, kl_k3):
        torch.testing.assert_close((p.exp() * estimate(p, q)).sum(), exact)
    assert (kl_k3(p, q) >= 0).all()
    assert (kl_k1(p, q) < 0).any()


def test_k3_pulls_the_policy_to_the_reference() -> None:
    logps = torch.tensor([-1.0, -3.0], requires_grad=True)
    kl_k3(logps, torch.tensor([-2.0, -2.0])).sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([1 - math.exp(-1), 1 - math.exp(1)])


def test_k3_pulls_from_tokens_that_the_reference_rules_out() -> None:
    logps = torch.tensor([-0.5], requires_grad=True)
    divergence = kl_k3(logps, torch.tensor([-40.5])).sum()
    divergence.backward()
    assert float(divergence.detach()) == pytest.approx(39.0)
    assert logps.grad is not None and float(logps.grad) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(6.0, 0.1), (6.6, 0.1 * 1.1), (60.0, 0.1 * 1.2), (5.7, 0.1 * 0.95), (-3.0, 0.1 * 0.8)],
)
def test_kl_coefficient_follows_its_target(kl: float, expected: float) -> None:
    assert adapt_kl_coef(0.1, kl, 6.0, 100, 100) == pytest.approx(expected)


def test_kl_coefficient_moves_with_the_samples_seen() -> None:
    assert adapt_kl_coef(0.1, 60.0, 6.0, 64, 10_000) == pytest.approx(0.1 * (1 + 0.2 * 0.0064))
