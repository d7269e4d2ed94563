"""Noise on embeddings: its range, its place, its absence outside training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from trainer.models.noise import EmbeddingNoise

WIDTH, ALPHA = 256, 5.0
LENGTHS = [[40, 10], [7]]  # two documents and one, then padding
ROW = 64


def noisy(
    training: bool = True, dtype: torch.dtype = torch.float32, seeds: tuple[int, ...] = (1, 2)
) -> Tensor:
    """Return what an embedding of zeros returns for a packed batch, or its first rows."""
    num = len(seeds)
    embedding = nn.Embedding(3, WIDTH, dtype=dtype).train(training)
    nn.init.zeros_(embedding.weight)
    noise = EmbeddingNoise(embedding, ALPHA)
    noise.set_rows(LENGTHS[:num], ROW, seeds)
    output: Tensor = embedding(torch.zeros(num, ROW, dtype=torch.long))
    return output.detach()


@pytest.mark.parametrize(
    ("row", "start", "stop"), [(0, 0, 40), (0, 40, 50), (1, 0, 7)], ids=["40", "10", "7"]
)
def test_each_document_gets_noise_for_its_own_length(row: int, start: int, stop: int) -> None:
    values = noisy()[row, start:stop]
    bound = ALPHA / math.sqrt((stop - start) * WIDTH)
    assert 0.99 * bound < values.abs().max() <= bound
    assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert abs(values.mean().item()) < 0.1 * bound


def test_padding_and_evaluation_get_none() -> None:
    values = noisy()
    assert not values[0, 50:].any() and not values[1, 7:].any()
    assert not noisy(training=False).any()


def test_a_row_has_numbers_of_its_own() -> None:
    assert torch.equal(noisy(), noisy())
    assert torch.equal(noisy(seeds=(1,))[0], noisy()[0])  # whatever shares its batch
    assert not torch.equal(noisy(seeds=(3,))[0], noisy()[0])
    assert noisy(dtype=torch.bfloat16).dtype == torch.bfloat16


def test_gradients_pass_unchanged() -> None:
    embedding = nn.Embedding(3, 4)
    noise = EmbeddingNoise(embedding, ALPHA)
    noise.set_rows([[2]], 2, [0])
    embedding(torch.tensor([[0, 2]])).sum().backward()
    assert embedding.weight.grad.tolist() == [[1.0] * 4, [0.0] * 4, [1.0] * 4]


def test_a_row_without_documents_gets_none() -> None:
    """Evaluation fills its last batch with such rows."""
    embedding = nn.Embedding(3, 4)
    noise = EmbeddingNoise(embedding, ALPHA)
    noise.set_rows([[2], []], 2, [0, 1])
    output = embedding(torch.zeros(2, 2, dtype=torch.long))
    assert torch.equal(output[1], embedding.weight[[0, 0]])
    assert not torch.equal(output[0], output[1])
