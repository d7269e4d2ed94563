"""Rows of token pieces to a batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.losses.cross_entropy import IGNORE_INDEX

# A batch's width is a multiple of this: tensor cores want 8, and a CPU's bf16 matmul keeps code for
# every shape it has met, half a gigabyte for a few hundred of them.
WIDTH_UNIT = 8


class Example(NamedTuple):
    """What a piece of a preference row is.

    Attributes:
        pair: tells the pairs of a batch apart; equal for the two sides of one.
        side: 1 chosen or desirable, -1 rejected or undesirable.
        document: its number in the source.
        margin: by how much the chosen answer is better; 0 where nobody said.
    """

    pair: tuple[int, int]
    side: int
    document: int
    margin: float


@dataclass(frozen=True)
class Row:
    """The content of one row.

    Attributes:
        pieces: token ids of the documents (or parts of them) in the row, in order.
        sample_id: global index of the row in the run; -1 for a row that only fills a batch.
        source_id: index of its source in the store.
        weights: factor of each token's loss as a target, piece by piece; None is 1.
        examples: of preferences: what each piece is.
    """

    pieces: Sequence[NDArray[Any]]
    sample_id: int
    source_id: int
    weights: Sequence[NDArray[np.float32]] | None = None
    examples: Sequence[Example] | None = None


@dataclass(frozen=True)
class Examples:
    """The n sequences of a batch of preferences, in the order of its rows and their pieces.

    Attributes:
        rows: ``[n]`` int64, the row of the batch.
        starts: ``[n]`` int64, its first token's place in the row.
        stops: ``[n]`` int64, the place after its last token.
        sides: ``[n]`` int64: 1 chosen or desirable, -1 rejected or undesirable.
        pairs: ``[n]`` int64, index of the pair in the batch; a lone example is a pair of its own.
        documents: ``[n]`` int64, the pair's number in its source.
        margins: ``[n]`` float32, of the pair.
    """

    rows: Tensor
    starts: Tensor
    stops: Tensor
    sides: Tensor
    pairs: Tensor
    documents: Tensor
    margins: Tensor

    @property
    def num_pairs(self) -> int:
        """Pairs in the batch, lone examples included."""
        return int(self.pairs.max()) + 1 if len(self.pairs) else 0


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
        examples: of preferences: where the sequences are and what they are.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    sample_ids: Tensor
    source_ids: Tensor
    piece_lengths: Sequence[Sequence[int]]
    weights: Tensor | None = None
    examples: Examples | None = None

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
        examples=_locate_examples(rows),
    )


def split_sequences(row: Row) -> list[Row]:
    """Return a row for each sequence of a row of preferences, for models that packing leaks in."""
    if not row.examples:
        return [row]  # it only fills a batch
    assert row.weights is not None
    return [
        Row([piece], row.sample_id, row.source_id, [weights], [example])
        for piece, weights, example in zip(row.pieces, row.weights, row.examples, strict=True)
    ]


def _locate_examples(rows: Sequence[Row]) -> Examples | None:
    if all(row.examples is None for row in rows):
        return None
    numbers: dict[tuple[int, int], int] = {}
    places: list[tuple[int, int, int]] = []
    examples: list[Example] = []
    for number, row in enumerate(rows):
        at = 0
        for piece, example in zip(row.pieces, row.examples or (), strict=True):
            places.append((number, at, at + len(piece)))
            numbers.setdefault(example.pair, len(numbers))
            examples.append(example)
            at += len(piece)
    in_rows, starts, stops = torch.tensor(places, dtype=torch.int64).view(-1, 3).T.contiguous()
    return Examples(
        rows=in_rows,
        starts=starts,
        stops=stops,
        sides=torch.tensor([example.side for example in examples], dtype=torch.int64),
        pairs=torch.tensor([numbers[example.pair] for example in examples], dtype=torch.int64),
        documents=torch.tensor([example.document for example in examples], dtype=torch.int64),
        margins=torch.tensor([example.margin for example in examples], dtype=torch.float32),
    )
