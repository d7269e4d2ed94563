"""A causal language model as the engine trains it: forward returns the summed loss."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from trainer.models.attention import use_document_attention
from trainer.models.head import LogpsOptions, causal_lm_logps, causal_lm_loss
from trainer.plan.architectures import read_size

PREFIX = "decoder."  # of parameter names inside ``LanguageModel``; checkpoints leave it out


class LanguageModel(nn.Module):
    """Wraps a transformers causal language model (or a peft one).

    Args:
        decoder: the model.
        num_tokens: tokens of the vocabulary; its matrices' further rows are padding.
    """

    def __init__(self, decoder: Any, num_tokens: int) -> None:
        super().__init__()
        use_document_attention(decoder)
        # What a folder's generation_config.json says would fill in for what we leave unset.
        decoder.generation_config = GenerationConfig()
        self.decoder, self.num_tokens = decoder, num_tokens

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        weights: Tensor | None = None,
        output: Literal["loss", "logps"] = "loss",
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the summed next-token loss, or the log-probability of each target.

        Args:
            input_ids: ``[batch, seq]``.
            position_ids: ``[batch, seq]``, starting at 0 with each document.
            labels: ``[batch, seq]``, unshifted; ``IGNORE_INDEX`` is no target.
            weights: ``[batch, seq]`` factor of each target's loss; None is 1. For the loss only.
            output: ``loss`` or ``logps``.
            temperature: what the logits are divided by; for ``logps`` only, like the next.
            with_entropy: also return the entropies.

        Returns:
            ``[]``, with the router loss of a mixture of experts while it trains; for ``logps``
            ``[n]`` fp32, the n targets in row-major order, or these and ``[n]`` entropies.
        """
        inputs = (self.decoder, input_ids, position_ids, labels, self.num_tokens)
        if output == "loss":
            return causal_lm_loss(*inputs, weights)
        return causal_lm_logps(*inputs, LogpsOptions(temperature, with_entropy))

    @torch.no_grad()
    def continue_text(
        self, input_ids: Tensor, max_new_tokens: int, stop_ids: Sequence[int]
    ) -> Tensor:
        """Return ``input_ids`` [1, seq] continued greedily by at most ``max_new_tokens``.

        The text ends at the first of ``stop_ids``. Padding rows of the vocabulary are never chosen.
        """
        rows = self.decoder.get_input_embeddings().num_embeddings
        # Learned positions end there; with others a text beyond would be like none it has seen.
        sizes = self.decoder.config.to_dict()
        positions = read_size(sizes, "max_position_embeddings") or sys.maxsize
        room = max(0, positions - input_ids.shape[1])
        if not room:
            return input_ids
        return self.decoder.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=min(max_new_tokens, room),
            do_sample=False,
            eos_token_id=list(stop_ids) or None,
            pad_token_id=next(iter(stop_ids), 0),
            suppress_tokens=list(range(self.num_tokens, rows)) or None,
        )


def name_in_decoder(name: str) -> str:
    """Return a parameter's name in the wrapped model, from that in its wrapper."""
    return name.removeprefix(PREFIX)
