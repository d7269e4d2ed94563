"""How many positions a model was made for."""

from __future__ import annotations

from transformers import PretrainedConfig

LENGTH_KEYS = ("max_position_embeddings", "seq_length", "max_seq_len", "n_positions")


def context_length(config: PretrainedConfig) -> int | None:
    """Return the positions a model was made for; None where its config names no limit."""
    values = config.get_text_config().to_dict()
    return next((int(values[key]) for key in LENGTH_KEYS if values.get(key)), None)
