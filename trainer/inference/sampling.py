"""Sampling that does not depend on what else is in the batch.

``generate`` draws a whole batch from one generator, so that an answer would change with its
neighbours, the number of ranks, or a resumed run. Here each row has random numbers of its own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trainer.inference.decoding import Decoding


class SeededChoice(LogitsProcessor):
    """Draws each row's token and leaves only that one, for a greedy search to take.

    Inversion: the token is the first whose cumulative probability exceeds a uniform number. One
    number a row and step, made on the host, so that CPU and GPU draw the same.

    Args:
        seed: of all rows; None draws one.
        names: of the rows; rows of one name and seed draw the same.
    """

    def __init__(self, seed: int | None, names: Sequence[str]) -> None:
        seed = random.SystemRandom().getrandbits(64) if seed is None else seed
        self._generators = [random.Random(f"{seed}/{name}") for name in names]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [rows, vocab] that are 0 for the drawn token and -inf elsewhere."""
        cumulative = scores.double().softmax(-1).cumsum(-1)
        # 32 bits: times the total, no number rounds up to the total itself.
        numbers = [generator.getrandbits(32) / 2**32 for generator in self._generators]
        wanted = torch.tensor(numbers, dtype=torch.double, device=scores.device).unsqueeze(-1)
        # right: of tokens with probability 0, which repeat a cumulative value, none is taken.
        drawn = torch.searchsorted(cumulative, wanted * cumulative[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn, 0.0)


def sampling_processors(decoding: Decoding, names: Sequence[str]) -> LogitsProcessorList:
    """Return what turns a greedy search into sampling as ``decoding`` says; empty if greedy.

    Args:
        decoding: the parameters.
        names: one per row of the batch, see ``SeededChoice``.
    """
    processors = LogitsProcessorList()
    if not decoding.samples:
        return processors
    if decoding.temperature != 1:
        processors.append(TemperatureLogitsWarper(decoding.temperature))
    if decoding.top_k:
        processors.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1:
        processors.append(TopPLogitsWarper(decoding.top_p))
    if decoding.min_p > 0:
        processors.append(MinPLogitsWarper(decoding.min_p))
    processors.append(SeededChoice(decoding.seed, names))
    return processors
