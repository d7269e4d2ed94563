"""The router loss: its value, which tokens count, and how it adds up over micro-batches."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from family_models import TINY, VOCAB, tiny_config, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from trainer.models.head import install_fused_head, supports_fused_head
from trainer.models.language_model import LanguageModel
from trainer.models.router import router_loss_coefficient, router_loss_sum

MIXTURES = [v for v in TINY if router_loss_coefficient(tiny_config(v)) > 0]
CONFIG: Any = SimpleNamespace(router_aux_loss_coef=0.5, num_experts_per_tok=1)


def test_value_by_hand() -> None:
    """Two tokens choose experts 0 and 1 of two: even loads, so 2 · Σ ½ · P = 1."""
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    labels = torch.tensor([[5, 6]])
    loss = router_loss_sum((logits,), CONFIG, labels)
    assert loss.item() == pytest.approx(0.5 * 1.0 * 1)  # one target
    uneven = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    share = math.exp(2) / (math.exp(2) + 1)
    assert router_loss_sum((uneven,), CONFIG, labels).item() == pytest.approx(0.5 * 2 * share)


def test_its_gradient_pushes_towards_the_idle_expert() -> None:
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]], requires_grad=True)
    router_loss_sum((logits,), CONFIG, torch.tensor([[5, 6]])).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1] < 0).all()


def test_padding_does_not_count_but_prompts_do() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator)
    labels = torch.tensor([[-100, -100, 7, 8, -100, -100]])  # prompt, answer, padding
    loss = router_loss_sum((logits,), CONFIG, labels)
    without = router_loss_sum((logits[:4],), CONFIG, labels[:, :4])
    assert loss.item() == pytest.approx(without.item())
    changed = logits.clone()
    changed[4:] = 50 * torch.randn(2, 4, generator=generator)
    assert router_loss_sum((changed,), CONFIG, labels).item() == pytest.approx(loss.item())
    changed[0] = torch.tensor([0.0, 0.0, 0.0, 9.0])
    assert router_loss_sum((changed,), CONFIG, labels).item() != pytest.approx(loss.item())


def test_a_batch_without_a_target_adds_nothing() -> None:
    """Its mean over no tokens is NaN, which 0 targets would not make 0."""
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = router_loss_sum((logits,), CONFIG, torch.full((1, 4), -100))
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()


def test_it_adds_up_with_the_targets_and_their_weights() -> None:
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, 3, 4]])
    plain = router_loss_sum((logits,), CONFIG, labels)
    weights = torch.tensor([[9.0, 0.5, 0.25, 1.0]])  # the first token is nobody's target
    weighted = router_loss_sum((logits,), CONFIG, labels, weights)
    assert weighted.item() == pytest.approx(plain.item() / 3 * 1.75)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "position_ids": torch.arange(16).repeat(2, 1), "labels": ids}


@pytest.mark.parametrize("variant", MIXTURES)
def test_it_is_transformers_own_and_only_trained(variant: str) -> None:
    """Mean loss + coefficient · router loss, as transformers adds them; not in evaluation."""
    model = tiny_model(variant)
    if supports_fused_head(model):
        install_fused_head(model, VOCAB)
    language_model = LanguageModel(model, VOCAB)
    inputs = batch()
    plain = AutoModelForCausalLM.from_config(tiny_config(variant))
    plain.load_state_dict(model.state_dict())
    plain.eval()  # the same arithmetic without dropout
    with torch.no_grad():
        expected = plain(**inputs, output_router_logits=True, use_cache=False)
        bare = plain(**inputs, output_router_logits=False, use_cache=False).loss
        evaluated = language_model.eval()(**inputs)
        for module in model.modules():
            module.training = False
        model.training = True  # of the whole, as in training, but with no dropout inside
        trained = language_model(**inputs)
    assert evaluated.item() / 30 == pytest.approx(bare.item(), rel=1e-5)
    assert trained.item() / 30 == pytest.approx(expected.loss.item(), rel=1e-5)
    assert trained.item() > evaluated.item()


@pytest.mark.parametrize("variant", MIXTURES)
def test_recomputed_layers_give_the_router_its_gradient(variant: str) -> None:
    grads = []
    for recomputed in (False, True):
        model = tiny_model(variant)
        if recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        language_model = LanguageModel(model, VOCAB).train()
        torch.manual_seed(0)
        language_model(**batch()).backward()
        found = {
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if "router" in name or name.endswith("gate.weight")
        }
        grads.append(found)
    assert grads[0]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)
