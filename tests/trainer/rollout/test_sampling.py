"""How tokens are drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from trainer.rollout import sampling as module
from trainer.rollout.sampling import Sampling, choose_tokens, draw_uniforms

VOCAB = 50


def expected_shares(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return the probabilities after transformers' own processors: [rows, vocab]."""
    ids = torch.zeros(len(logits), 1, dtype=torch.int64)
    scores = TemperatureLogitsWarper(sampling.temperature)(ids, logits)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    return scores.softmax(-1)


@pytest.mark.parametrize("nucleus", [512, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 7},
        {"top_p": 0.6},
        {"top_k": 10, "top_p": 0.5, "temperature": 2.0},
        {"top_p": 1e-6},
    ],
)
def test_shares_of_a_fine_grid_are_the_probabilities(
    changes: dict[str, Any], nucleus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NUCLEUS", nucleus)  # 4: fewer than the share needs, so it sorts
    sampling = Sampling(**changes)
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0)) * 2
    size = 20_000  # numbers in equal steps: each token as often as its probability says
    numbers = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    for row, shares in zip(logits, expected_shares(logits, sampling), strict=True):
        drawn = choose_tokens(row.expand(size, -1), numbers, sampling)
        counts = torch.bincount(drawn, minlength=VOCAB) / size
        torch.testing.assert_close(counts, shares, atol=2.1 / size, rtol=0)


def test_numbers_at_the_ends_draw_tokens_that_can_be() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, -1)
    numbers = torch.tensor([0.0, 1 - 2.0**-32], dtype=torch.float64)
    assert choose_tokens(logits, numbers, Sampling()).tolist() == [1, 2]


def test_places_far_into_a_large_vocabulary() -> None:
    # More than a block, an uneven number of them, most places impossible.
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, [5, 255, 256, 700, 999]] = 0.0
    numbers = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 1 - 2.0**-32], dtype=torch.float64)
    drawn = choose_tokens(logits.expand(6, -1), numbers, Sampling())
    assert drawn.tolist() == [5, 255, 256, 700, 999, 999]


def test_only_possible_tokens_are_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 700, generator=generator) * 8
    impossible = torch.rand(logits.shape, generator=generator) < 0.9
    logits[impossible] = -torch.inf
    numbers = draw_uniforms(0, 0, [0], 2000)[0]
    numbers[::2] = 1 - 2.0**-32
    drawn = choose_tokens(logits, numbers, Sampling())
    assert not impossible.gather(-1, drawn.unsqueeze(-1)).any()


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    numbers = torch.full((2,), 0.99, dtype=torch.float64)
    assert choose_tokens(logits, numbers, Sampling(temperature=0.0)).tolist() == [1, 0]


def test_numbers_are_a_function_of_their_key() -> None:
    whole = draw_uniforms(3, 5, range(8), 40)
    assert torch.equal(draw_uniforms(3, 5, [6, 2], 40), whole[[6, 2]])
    assert torch.equal(draw_uniforms(3, 5, range(8), 12), whole[:, :12])
    for other in [(4, 5), (3, 6)]:
        assert (draw_uniforms(*other, range(8), 40) != whole).all()
    assert whole.unique().numel() == whole.numel()
    assert whole.min() >= 0 and whole.max() < 1


def test_numbers_are_the_same_on_every_machine() -> None:
    # Philox4x64-10 under BLAKE2b of "0/0/0": a change would change the answers of resumed runs.
    expected = [0.6195789375342429, 0.9083427062723786, 0.02940115937963128]
    assert draw_uniforms(0, 0, [0], 3)[0].tolist() == expected


def test_numbers_are_uniform() -> None:
    numbers = draw_uniforms(0, 0, range(200), 500).flatten()
    counts = torch.histc(numbers, 20, 0, 1) / numbers.numel()
    assert (counts - 0.05).abs().max() < 0.003


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"cached_tokens": 0}, "cached_tokens=0"),
    ],
)
def test_values_that_make_no_sense_are_named(changes: dict[str, Any], key: str) -> None:
    assert Sampling().problems() == []
    (problem,) = Sampling(**changes).problems()
    assert problem.startswith(f"{key}: expected")
