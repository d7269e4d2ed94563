"""Log-probabilities of whole answers, from a model's forward over rows of sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.data.batches.collate import Batch
from trainer.losses.cross_entropy import IGNORE_INDEX

# (input_ids, position_ids, labels), each [rows, length] on the device -> [targets], row-major.
TokenLogps = Callable[..., Tensor]


class SequenceLogps(NamedTuple):
    """Answers of a batch, in the order of its examples.

    Attributes:
        sums: ``[n]`` log-probability of each answer (nats): the sum over its tokens.
        lengths: ``[n]`` tokens that the sum is over, in the same dtype.
    """

    sums: Tensor
    lengths: Tensor


def sum_over_sequences(
    batch: Batch, token_logps: TokenLogps, device: torch.device
) -> SequenceLogps:
    """Return the log-probability of every example's answer in one forward pass.

    Args:
        batch: with examples.
        token_logps: the model's log-probability of each target.
        device: of the model.
    """
    assert batch.examples is not None
    inputs = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "labels": batch.labels,
    }
    logps = token_logps(**{k: v.to(device, non_blocking=True) for k, v in inputs.items()})
    of_target = number_targets(batch)
    num_examples = len(batch.examples.rows)
    lengths = torch.bincount(of_target, minlength=num_examples).to(device, logps.dtype)
    sums = torch.zeros(num_examples, dtype=logps.dtype, device=device)
    return SequenceLogps(sums.index_add(0, of_target.to(device), logps), lengths)


def number_targets(batch: Batch) -> Tensor:
    """Return the example of each target of a batch, in row-major order. -> [targets]"""
    examples = batch.examples
    assert examples is not None
    numbers = torch.full(batch.input_ids.shape, -1)
    places = torch.stack([examples.rows, examples.starts, examples.stops], 1).tolist()
    for number, (row, start, stop) in enumerate(places):
        numbers[row, start:stop] = number
    return numbers[:, 1:][batch.labels[:, 1:] != IGNORE_INDEX]
