"""The ranking loss against hand values, a float64 reference and TRL's formula."""

import math

import pytest
import torch
from torch import Tensor

from trainer.losses.ranking import ranking_losses


def trl_loss(chosen: Tensor, rejected: Tensor, margins: Tensor, centering: float) -> Tensor:
    """Return the mean over pairs as TRL 0.24's RewardTrainer computes it."""
    loss = -torch.nn.functional.logsigmoid(chosen - rejected - margins).mean()
    return loss + centering * torch.mean((chosen + rejected) ** 2)


def test_hand_values() -> None:
    chosen, rejected = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 3.0])
    # log(1 + e^-1), log 2, log(1 + e)
    expected = [0.3132616875, 0.6931471806, 1.3132616875]
    assert ranking_losses(chosen, rejected).tolist() == pytest.approx(expected, abs=1e-7)
    margins = torch.tensor([1.0, 0.0, -1.0])
    expected = [0.6931471806, 0.6931471806, 0.6931471806]
    assert ranking_losses(chosen, rejected, margins).tolist() == pytest.approx(expected, abs=1e-7)
    centred = ranking_losses(chosen, rejected, margins, 0.01) - ranking_losses(
        chosen, rejected, margins
    )
    assert centred.tolist() == pytest.approx([0.01, 0.0, 0.25], abs=1e-7)


def test_equals_a_float64_reference_and_trl() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, margins = torch.randn(3, 64, generator=generator, dtype=torch.float64) * 4
    ours = ranking_losses(chosen, rejected, margins, 0.3)
    plain = [
        -math.log(1 / (1 + math.exp(-(c - r - m)))) + 0.3 * (c + r) ** 2
        for c, r, m in zip(chosen.tolist(), rejected.tolist(), margins.tolist(), strict=True)
    ]
    assert ours.tolist() == pytest.approx(plain, rel=1e-12)
    assert ours.mean().item() == pytest.approx(
        trl_loss(chosen, rejected, margins, 0.3).item(), rel=1e-12
    )
    low = ranking_losses(chosen.float(), rejected.float(), margins.float(), 0.3)
    torch.testing.assert_close(low.double(), ours, rtol=1e-6, atol=1e-6)


def test_gradient_raises_the_chosen_and_lowers_the_rejected() -> None:
    chosen = torch.tensor([0.5, -200.0], requires_grad=True)
    rejected = torch.tensor([0.2, 200.0], requires_grad=True)
    losses = ranking_losses(chosen, rejected)
    losses.sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert (chosen.grad < 0).all() and (rejected.grad > 0).all()
    assert chosen.grad.tolist() == pytest.approx([-1 / (1 + math.exp(0.3)), -1.0], abs=1e-6)
    assert losses[1].item() == 400.0  # where σ is 0 in float32


def test_centering_draws_the_sum_to_zero_and_leaves_the_difference() -> None:
    chosen = torch.tensor([3.0], requires_grad=True)
    rejected = torch.tensor([1.0], requires_grad=True)
    difference = ranking_losses(chosen, rejected, None, 0.5) - ranking_losses(chosen, rejected)
    difference.sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() == rejected.grad.item() == pytest.approx(4.0)
