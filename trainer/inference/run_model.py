"""The model of a run's checkpoint, put together without DeepSpeed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from tokenizer.load import load_tokenizer, num_ids
from trainer.config import RunConfig, load_config
from trainer.engine.committed import Reader, find_checkpoint
from trainer.errors import CheckpointError, ConfigError
from trainer.models.adapter_files import run_adapter
from trainer.models.export import Weights
from trainer.models.load import find_aliases, make_config

RUN_CONFIG = "config.yaml"


def load_run(
    folder: Path, base: str | None, step: int | None, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a run's model, adapters merged in, and its tokenizer.

    Args:
        folder: the run folder.
        base: where the run's base model is now, if it has moved.
        step: of the checkpoint; None = the newest.
        dtype: of the weights.

    Raises:
        CheckpointError: no such checkpoint, or it does not hold the whole model.
        ConfigError: a run without a model of its own, or its base is gone.
    """
    config = _read_config(folder)
    base_folder = _find_base(folder, config, base)
    architecture = config.model
    if base_folder is not None:
        architecture = dataclasses.replace(architecture, path=str(base_folder))
    checkpoint = find_checkpoint(folder / "checkpoints", step)
    tokenizer = load_tokenizer(folder / "tokenizer")
    special = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    model_config = make_config(architecture, num_ids(tokenizer), special)
    reader = Reader(checkpoint)
    weights = Weights(
        reader.shapes,
        reader.read_whole,
        base_folder,
        run_adapter(folder),
        find_aliases(model_config),
    )
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    model.tie_weights()
    _fill(model, weights, folder)
    return model, tokenizer


def _read_config(folder: Path) -> RunConfig:
    path = folder / RUN_CONFIG
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no configuration; is {folder} a run folder?")
    config = load_config(values)
    if config.stage["name"] == "vocab":
        raise ConfigError(f"{folder} is a vocabulary run; its model is {folder / 'model'}")
    return config


def _find_base(folder: Path, config: RunConfig, moved_to: str | None) -> Path | None:
    """Return the model folder that the run's frozen weights are in."""
    if config.model.path is None:
        if moved_to is not None:
            raise ConfigError(f"base={moved_to}: {folder} was trained from scratch, it has no base")
        return None
    path = Path(moved_to or config.model.path)
    if not (path / "config.json").is_file():
        raise ConfigError(f"{folder} was trained on {path}, which is not there; give base=FOLDER")
    return path


def _fill(model: PreTrainedModel, weights: Weights, folder: Path) -> None:
    """Set every parameter, one at a time."""
    params = dict(model.named_parameters())
    if missing := sorted(params.keys() - weights.shapes.keys()):
        raise CheckpointError(
            f"{folder} and its base lack {len(missing)} parameters under the model's names, for "
            f"example {missing[0]}; export the run with `kuroshio export` and load that folder"
        )
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(weights.read(name))
