"""NEFTune: uniform noise on the input embeddings while a model is fine-tuned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class EmbeddingNoise:
    """Adds noise to what an embedding layer returns in training (arXiv:2310.05914, algorithm 1).

    Each element of a document's embeddings gets a number drawn evenly from -s to s, where
    ``s = alpha / sqrt(L * d)``, L is the document's own length, also in a packed row, and d the
    width of the embeddings. A row's numbers come from a generator of its own, so they depend on no
    other row, nor on how rows are dealt to batches and ranks.

    Args:
        embedding: the model's input embedding; the noise stays on it.
        alpha: strength; 5 to 15 in the paper.
    """

    def __init__(self, embedding: nn.Module, alpha: float) -> None:
        self.alpha = alpha
        self._scales: Tensor | None = None
        self._seeds: Sequence[int] = ()
        self._num_tokens: list[int] = []
        embedding.register_forward_hook(self._add)

    def set_rows(
        self, piece_lengths: Sequence[Sequence[int]], length: int, seeds: Sequence[int]
    ) -> None:
        """Say where the documents of the next batch are, and what numbers they get.

        Args:
            piece_lengths: tokens of each row's documents, in order; padding follows.
            length: tokens of a row with its padding.
            seeds: of each row's generator.
        """
        scales = torch.zeros(len(piece_lengths), length)
        for row, lengths in zip(scales, piece_lengths, strict=True):
            own = torch.tensor(lengths, dtype=torch.long)  # none in a row that fills a batch
            row[: int(own.sum())] = own.rsqrt().repeat_interleave(own)
        self._scales, self._seeds = self.alpha * scales, seeds
        self._num_tokens = [sum(lengths) for lengths in piece_lengths]

    def _add(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Return ``output`` [rows, length, d] with noise, in training only."""
        if not module.training or self._scales is None:
            return output
        scales = self._scales.to(output) / output.shape[-1] ** 0.5
        noise, generator = torch.zeros_like(output), torch.Generator(output.device)
        for row, num, seed in zip(noise, self._num_tokens, self._seeds, strict=True):
            # So many as the row has tokens: a GPU's numbers depend on how many are drawn.
            row[:num] = row.new_empty(num, row.shape[-1]).uniform_(
                -1, 1, generator=generator.manual_seed(seed)
            )
        return output + noise * scales[..., None]
