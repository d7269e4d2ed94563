"""Values of the embedding rows that a new vocabulary needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tokenizer.load import num_ids
from trainer.errors import ConfigError

Init = Literal["subpiece_mean", "mean", "normal"]
CHUNK_ROWS = 2048  # rows held in float32 at once; the normal draws depend on it


@dataclass(frozen=True)
class Vocabulary:
    """How the ids of the new tokenizer relate to those of the base.

    Attributes:
        num_base: ids that both share; their rows are kept.
        subpieces: for each further id, the base ids its piece splits into; empty: take the mean.
    """

    num_base: int
    subpieces: list[list[int]]

    @property
    def num_ids(self) -> int:
        """Ids of the new tokenizer."""
        return self.num_base + len(self.subpieces)


def relate_vocabularies(base: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast) -> Vocabulary:
    """Compare two tokenizers of which the second extends the first.

    A new piece is split by the base's merges alone: no dummy prefix and no normaliser, so that no
    stray ``▁`` enters the mean of a piece that does not begin with a space.

    Raises:
        ConfigError: an id of the base means another piece in the new tokenizer.
    """
    num_base, num_new = num_ids(base), num_ids(new)
    old_pieces = base.convert_ids_to_tokens(range(num_base))
    pieces = new.convert_ids_to_tokens(range(num_new))
    for index, (old, piece) in enumerate(zip(old_pieces, pieces, strict=False)):
        if old != piece:
            raise ConfigError(
                f"the new tokenizer ({num_new} ids) does not extend the model's ({num_base} ids): "
                f"id {index} is {piece!r} there and {old!r} here; "
                "set stage.base_tokenizer to the model's own tokenizer"
            )
    if num_new < num_base:
        raise ConfigError(
            f"the new tokenizer has {num_new} ids, fewer than the model's {num_base}; "
            "set stage.base_tokenizer to the model's own tokenizer"
        )
    split, unknown = base.backend_tokenizer.model.tokenize, base.unk_token_id
    special = set(new.all_special_ids) | set(new.added_tokens_decoder)
    subpieces = []
    for index in range(num_base, num_new):
        ids = [] if index in special else [token.id for token in split(pieces[index])]
        subpieces.append([] if unknown in ids else ids)
    return Vocabulary(num_base, subpieces)


def mean_row(matrix: Tensor, num_rows: int) -> Tensor:
    """Return the mean of the first ``num_rows`` rows, ``[dim]`` in float64, chunk by chunk."""
    total = torch.zeros(matrix.shape[1], dtype=torch.float64)
    for start in range(0, num_rows, CHUNK_ROWS):
        total += matrix[start : min(start + CHUNK_ROWS, num_rows)].double().sum(0)
    return total / num_rows


def iterate_new_rows(
    matrix: Tensor, vocabulary: Vocabulary, num_rows: int, init: Init, seed: int
) -> Iterator[Tensor]:
    """Yield the rows after the base's, in chunks.

    Args:
        matrix: the base matrix ``[rows, dim]`` (may be a memory map).
        vocabulary: from ``relate_vocabularies``.
        num_rows: rows of the new matrix; those beyond the vocabulary get the mean.
        init: ``mean`` of the base's rows, ``subpiece_mean``, or ``normal`` = mean + N(0, 1/√dim).
        seed: of ``normal``; the result does not depend on rank or machine.

    Yields:
        ``[chunk, dim]`` in the dtype of ``matrix``; ``num_rows - vocabulary.num_base`` rows in all.
    """
    mean = mean_row(matrix, vocabulary.num_base).float()
    generator = torch.Generator().manual_seed(seed)
    num_padding = num_rows - vocabulary.num_ids
    for start in range(0, len(vocabulary.subpieces), CHUNK_ROWS):
        chunk = vocabulary.subpieces[start : start + CHUNK_ROWS]
        rows = mean.expand(len(chunk), -1).clone()
        if init == "normal":
            noise = torch.randn(rows.shape, generator=generator)
            rows += noise / matrix.shape[1] ** 0.5
        elif init == "subpiece_mean":
            rows = _subpiece_means(matrix, chunk, rows)
        yield rows.to(matrix.dtype)
    if num_padding:
        yield mean.expand(num_padding, -1).to(matrix.dtype)


def _subpiece_means(matrix: Tensor, chunk: list[list[int]], rows: Tensor) -> Tensor:
    """Return ``rows [chunk, dim]`` with the mean of the sub-pieces where there are any."""
    used = sorted({index for ids in chunk for index in ids})
    table = {index: place for place, index in enumerate(used)}
    values = matrix[used].float()
    for place, ids in enumerate(chunk):
        if ids:
            rows[place] = values[[table[index] for index in ids]].mean(0)
    return rows
