"""Rows of token pieces to a batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.losses.cross_entropy import IGNORE_INDEX

# A batch's width is a multiple of this: tensor cores want 8, and a CPU's bf16 matmul keeps code for
# every shape it has met, half a gigabyte for a few hundred of them.
WIDTH_UNIT = 8


@dataclass(frozen=True)
class Row:
    """The content of one row.

    Attributes:
        pieces: token ids of the documents (or parts of them) in the row, in order.
        sample_id: global index of the row in the run; -1 for a row that only fills a batch.
        source_id: index of its source in the store.
        weights: factor of each token's loss as a target, piece by piece; None is 1.
    """

    pieces: Sequence[NDArray[Any]]
    sample_id: int
    source_id: int
    weights: Sequence[NDArray[np.float32]] | None = None


@dataclass(frozen=True)
class Batch:
    """A micro-batch on the CPU. There is no attention mask: padding is on the right, where causal
    attention never looks, and packed documents are told apart by where positions restart.

    Attributes:
        input_ids: ``[rows, length]`` int64.
        labels: ``[rows, length]`` int64, not shifted; ``IGNORE_INDEX`` at padding, where the weight
            is 0, and at the first token of every piece, which nothing in its row could predict.
        position_ids: ``[rows, length]`` int64; from 0 at each piece when documents are isolated.
        sample_ids: ``[rows]`` int64, global row index.
        source_ids: ``[rows]`` int64.
        piece_lengths: tokens of each row's pieces, in order.
        weights: ``[rows, length]`` float32, not shifted; 0 where there is no label. None is 1.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    sample_ids: Tensor
    source_ids: Tensor
    piece_lengths: Sequence[Sequence[int]]
    weights: Tensor | None = None

    @property
    def num_targets(self) -> float:
        """What a mean over the targets divides by: their number, or the sum of their weights."""
        if self.weights is not None:
            return float(self.weights.sum(dtype=torch.float64))
        return float(self.num_trained)

    @property
    def num_trained(self) -> int:
        """Tokens that are predicted."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(map(sum, self.piece_lengths))


def batch_width(rows: Sequence[Row], max_length: int) -> int:
    """Return the width of a batch: its longest row's, rounded up, at most ``max_length``."""
    longest = max(2, *(sum(map(len, row.pieces)) for row in rows))
    return min(-(-longest // WIDTH_UNIT) * WIDTH_UNIT, max_length)


def collate(rows: Sequence[Row], *, length: int | None, pad_token_id: int, isolate: bool) -> Batch:
    """Lay rows out as tensors, padded on the right.

    Args:
        rows: contents, one per row of the batch.
        length: width of the batch; None takes the longest row.
        pad_token_id: any valid id; it is never a label.
        isolate: restart positions at each piece, and at the padding, so that attention by
            position sees each piece alone.

    Returns:
        The batch, ``[len(rows), length]``.
    """
    if length is None:
        length = max(2, *(sum(map(len, row.pieces)) for row in rows))
    shape = (len(rows), length)
    input_ids = np.full(shape, pad_token_id, np.int64)
    labels = np.full(shape, IGNORE_INDEX, np.int64)
    position_ids = np.tile(np.arange(length, dtype=np.int64), (len(rows), 1))
    is_weighted = any(row.weights is not None for row in rows)
    weights = np.zeros(shape, np.float32) if is_weighted else None
    for i, row in enumerate(rows):
        at = 0
        for number, piece in enumerate(row.pieces):
            end = at + len(piece)
            input_ids[i, at:end] = piece
            labels[i, at + 1 : end] = piece[1:]
            if weights is not None:
                own = row.weights[number][1:] if row.weights else np.float32(1)
                weights[i, at + 1 : end] = own
                labels[i, at + 1 : end][weights[i, at + 1 : end] == 0] = IGNORE_INDEX
            if isolate:
                position_ids[i, at:end] -= at
            at = end
        if isolate:
            position_ids[i, at:] -= at
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        sample_ids=torch.tensor([row.sample_id for row in rows], dtype=torch.int64),
        source_ids=torch.tensor([row.source_id for row in rows], dtype=torch.int64),
        piece_lengths=[[len(piece) for piece in row.pieces] for row in rows],
        weights=None if weights is None else torch.from_numpy(weights),
    )
