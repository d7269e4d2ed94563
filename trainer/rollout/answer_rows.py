"""Prompts with their responses in packed rows, dealt to ranks and micro-batches.

Which samples share a row, a batch or a rank changes nothing in sums over their tokens. Every rank
gets equally many batches, since under ZeRO all ranks compute together: where rows are fewer, short
ones that count nothing fill up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.data.batches.bins import fill_bins
from trainer.data.batches.collate import Row, batch_width, collate
from trainer.losses.cross_entropy import IGNORE_INDEX

FILLER_TOKENS = 2  # the shortest sample: a prompt and a response of a token each


@dataclass(frozen=True)
class Sample:
    """A prompt and a response to it, as token ids; neither is empty."""

    prompt: Sequence[int]
    response: Sequence[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class Layout:
    """How rows are laid out.

    Attributes:
        max_length: tokens a row.
        micro_batch_size: rows a rank computes at once.
        packing: whether samples share rows.
        pad_token_id: any valid id.
        rank: this rank.
        world_size: number of ranks.
    """

    max_length: int
    micro_batch_size: int
    packing: bool
    pad_token_id: int
    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class AnswerBatch:
    """A micro-batch of samples; its n targets are the responses' tokens in row-major order.

    Attributes:
        input_ids: ``[rows, length]`` int64.
        position_ids: ``[rows, length]`` int64, from 0 at each sample where samples share rows.
        labels: ``[rows, length]`` int64, not shifted; ``IGNORE_INDEX`` but at responses.
        before: ``[n]`` int64, flat place of the token before each target: the state it was chosen
            in, where its value is read.
        last: ``[samples]`` int64, flat place of each sample's last token, where it is scored.
        samples: numbers of the samples, in row-major order; none where the batch only fills up.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    before: Tensor
    last: Tensor
    samples: list[int]


def deal(
    samples: Sequence[Sample], numbers: Sequence[int], layout: Layout
) -> Iterator[AnswerBatch]:
    """Yield this rank's micro-batches of some samples, as many as every other rank's.

    Args:
        samples: of the iteration.
        numbers: which of them.
        layout: of the rows.
    """
    rows = pack(samples, numbers, layout)
    unit = layout.world_size * layout.micro_batch_size
    for start in range(0, len(rows), unit):
        # In turn: where rows do not fill all ranks' batches, each rank gets its share of them.
        own = rows[start : start + unit][layout.rank :: layout.world_size]
        yield lay_out(samples, own, layout)


def pack(samples: Sequence[Sample], numbers: Sequence[int], layout: Layout) -> list[list[int]]:
    """Return the numbers of the samples in each row, the fullest rows first."""
    order = sorted(numbers, key=lambda number: -len(samples[number]))
    if not layout.packing:
        return [[number] for number in order]
    bins = fill_bins(np.array([len(samples[number]) for number in order]), layout.max_length)
    rows = [[order[place] for place in bins[index].tolist()] for index in range(len(bins))]
    return sorted(rows, key=lambda row: -sum(len(samples[number]) for number in row))


def lay_out(
    samples: Sequence[Sample], rows: Sequence[Sequence[int]], layout: Layout
) -> AnswerBatch:
    """Return the tensors of rows of samples; without rows, a batch that counts nothing."""
    pad = layout.pad_token_id
    filler = Sample([pad] * (FILLER_TOKENS - 1), [pad])
    pieces = [[samples[number] for number in row] for row in rows] or [[filler]]
    contents = [_row(number, row) for number, row in enumerate(pieces)]
    width = batch_width(contents, layout.max_length)
    batch = collate(contents, length=width, pad_token_id=pad, isolate=layout.packing)
    is_target = torch.zeros_like(batch.labels, dtype=torch.bool)
    is_target[:, :-1] = batch.labels[:, 1:] != IGNORE_INDEX
    last = []
    for number, row in enumerate(pieces):
        ends = np.cumsum([len(sample) for sample in row])
        last += [number * width + end - 1 for end in ends.tolist()]
    return AnswerBatch(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        labels=batch.labels,
        before=is_target.flatten().nonzero().squeeze(1),
        last=torch.tensor(last),
        samples=[number for row in rows for number in row],
    )


def _row(number: int, samples: Sequence[Sample]) -> Row:
    pieces = [np.array([*sample.prompt, *sample.response]) for sample in samples]
    weights = [
        np.repeat(np.array([0, 1], np.float32), (len(sample.prompt), len(sample.response)))
        for sample in samples
    ]
    return Row(pieces, number, 0, weights)
