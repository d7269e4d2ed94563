"""Which parameters are trained: all, those matching a regex, or low-rank adapters."""

from __future__ import annotations

import re

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from trainer.config import PeftConfig
from trainer.errors import ConfigError


def apply_peft(model: PreTrainedModel, peft: PeftConfig) -> PreTrainedModel | PeftModel:
    """Set ``requires_grad`` (and add adapters) as the peft group says.

    Raises:
        ConfigError: when nothing would be trained.
    """
    if peft.mode == "freeze":
        _freeze_all_but(model, str(peft.trainable))
    if peft.mode != "lora":
        return model
    embeddings = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=peft.rank,
            lora_alpha=peft.alpha,
            lora_dropout=peft.dropout,
            target_modules=peft.target_modules,
            task_type="CAUSAL_LM",
        ),
        # One dtype for all trained parameters; the fp32 masters are DeepSpeed's.
        autocast_adapter_dtype=False,
    )
    for weight in embeddings if peft.train_embeddings else []:
        # peft's modules_to_save would copy each matrix and so untie tied ones.
        weight.requires_grad_(True)
    return adapted


def _freeze_all_but(model: PreTrainedModel, pattern: str) -> None:
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"peft.trainable={pattern!r} is no valid regex: {error}") from error
    names = [name for name, _ in model.named_parameters()]
    if not any(regex.search(name) for name in names):
        raise ConfigError(
            f"peft.trainable={pattern!r} matches no parameter; names look like "
            f"{', '.join(names[:2] + names[-1:])}"
        )
    for name, param in model.named_parameters():
        param.requires_grad_(bool(regex.search(name)))
