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


@dataclass(frozen=True)
class Row:
    """The content of one row.

    Attributes:
        pieces: token ids of the documents (or parts of them) in the row, in order.
        sample_id: global index of the row in the run; -1 for a row that only fills a batch.
        source_id: index of its source in the store.
    """

    pieces: Sequence[NDArray[Any]]
    sample_id: int
    source_id: int


@dataclass(frozen=True)
class Batch:
    """A micro-batch on the CPU. There is no attention mask: padding is on the right, where causal
    attention never looks, and packed documents are told apart by where positions restart.

    Attributes:
        input_ids: ``[rows, length]`` int64.
        labels: ``[rows, length]`` int64, not shifted; ``IGNORE_INDEX`` at padding and at the first
            token of every piece, which nothing in its row could predict.
        position_ids: ``[rows, length]`` int64; from 0 at each piece when documents are isolated.
        sample_ids: ``[rows]`` int64, global row index.
        source_ids: ``[rows]`` int64.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    sample_ids: Tensor
    source_ids: Tensor

    @property
    def num_targets(self) -> int:
        """Tokens of the batch that are predicted."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())


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
    for i, row in enumerate(rows):
        at = 0
        for piece in row.pieces:
            end = at + len(piece)
            input_ids[i, at:end] = piece
            labels[i, at + 1 : end] = piece[1:]
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
    )
