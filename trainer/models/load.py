"""Models from a folder or from scratch, ready for any ZeRO stage.

Under ZeRO-3 the caller opens the engine's ``partitioned_loading`` around ``load_model``; then
transformers creates and fills the parameters already partitioned and no rank ever holds the whole
model.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations import is_deepspeed_zero3_enabled

from trainer.config import ModelConfig
from trainer.errors import ConfigError


def read_architecture(model: ModelConfig) -> dict[str, Any]:
    """Return the architecture as plain data, without importing a model class.

    Raises:
        ConfigError: neither or both of path and architecture, or no readable config.json.
    """
    if (model.path is None) == (model.architecture is None):
        raise ConfigError(
            f"model.path={model.path} and model.architecture="
            f"{'null' if model.architecture is None else 'set'}: give exactly one of the two"
        )
    if model.architecture is not None:
        return dict(model.architecture)
    path = Path(str(model.path)) / "config.json"
    try:
        architecture: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={model.path} is no model folder: {error}") from error
    return architecture


def make_config(
    model: ModelConfig, num_tokens: int, special_ids: dict[str, Any]
) -> PretrainedConfig:
    """Return the transformers config of the run's model.

    Args:
        model: the model group.
        num_tokens: tokenizer ids; a model from scratch gets that many rows, rounded up.
        special_ids: bos, eos and pad ids for a model from scratch.
    """
    architecture = read_architecture(model)
    if model.path is not None:
        return AutoConfig.from_pretrained(model.path, local_files_only=True)
    model_type = architecture.pop("model_type")
    rows = -(-num_tokens // model.pad_vocab_to) * model.pad_vocab_to
    return AutoConfig.for_model(model_type, **{**architecture, "vocab_size": rows, **special_ids})


def measure(config: PretrainedConfig) -> tuple[int, int]:
    """Return (all parameters, elements of the largest one), from shapes alone."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    sizes = [p.numel() for p in model.parameters()]
    return sum(sizes), max(sizes)


def load_model(
    model: ModelConfig, config: PretrainedConfig, dtype: torch.dtype, seed: int
) -> PreTrainedModel:
    """Load or create the model in ``dtype``; the same weights on every rank and ZeRO stage.

    Args:
        model: the model group.
        config: from ``make_config``.
        dtype: of the weights.
        seed: of the initial weights of a model from scratch.
    """
    if model.path is not None:
        return AutoModelForCausalLM.from_pretrained(
            model.path, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        )
    partitioned = is_deepspeed_zero3_enabled()
    torch.manual_seed(seed)
    # Constructors would draw numbers of their own, which zero.Init's do not.
    with nullcontext() if partitioned else no_init_weights():
        created = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if not partitioned:
        torch.manual_seed(seed)
        with torch.no_grad():
            created.initialize_weights()
        created.tie_weights()
    return created
