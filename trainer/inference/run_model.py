"""The model of a run's checkpoint, put together without DeepSpeed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import yaml
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights

from tokenizer.load import load_tokenizer, num_ids
from trainer.config import RunConfig, load_config
from trainer.engine.committed import Checkpoint, Reader, find_checkpoint
from trainer.engine.precision import DTYPES
from trainer.errors import CheckpointError, ConfigError
from trainer.models.actor_critic import policy_shapes
from trainer.models.adapter_files import noted_base, run_adapter
from trainer.models.export import Weights, transposed_weights
from trainer.models.identity import model_identity, refuse_other_base
from trainer.models.load import find_aliases, make_config, outline, special_ids
from trainer.models.quantize import as_quantized, quantized_weights, require_bitsandbytes

RUN_CONFIG = "config.yaml"


def load_run(
    folder: Path, base: str | None, checkpoint: Checkpoint, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a run's model, adapters merged in, and its tokenizer.

    Args:
        folder: the run folder.
        base: where the run's base model is now, if it has moved.
        checkpoint: one of the run's.
        dtype: of the weights.

    Raises:
        CheckpointError: the checkpoint does not hold the whole model.
        ConfigError: the run's base is gone, or it is a reward run.
    """
    config = read_run_config(folder)
    if config.stage["name"] == "reward":
        raise ConfigError(
            f"{folder} is a reward run: its model scores answers and writes none; export it with "
            f"kuroshio export {folder} OUT"
        )
    base_folder = _find_base(folder, config, base)
    if base_folder is not None and config.peft.mode == "freeze":
        refuse_other_base(base_folder, checkpoint.state["inputs"])
    architecture = config.model
    if base_folder is not None:
        architecture = dataclasses.replace(architecture, path=str(base_folder))
    tokenizer = load_tokenizer(folder / "tokenizer")
    model_config = make_config(architecture, num_ids(tokenizer), special_ids(tokenizer))
    reader = Reader(checkpoint)
    shape = outline(model_config)
    weights = Weights(
        policy_shapes(reader.shapes),
        reader.read_whole,
        base_folder,
        run_adapter(folder),
        find_aliases(model_config),
        transposed_weights(shape),
        _as_trained(config, shape, checkpoint),
    )
    model = _create(model_config, dtype, architecture.trust_remote_code)
    _fill(model, weights, folder)
    return model, tokenizer


def find_run_checkpoint(folder: Path, step: int | None) -> Checkpoint:
    """Return a run's newest complete checkpoint, or that of ``step``.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigError: a vocabulary run, which has none.
    """
    if read_run_config(folder).stage["name"] == "vocab":
        raise ConfigError(f"{folder} is a vocabulary run; its model is {folder / 'model'}")
    return find_checkpoint(folder / "checkpoints", step)


def read_run_config(folder: Path) -> RunConfig:
    """Return the frozen config of a run.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: it is no valid config.
    """
    path = folder / RUN_CONFIG
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no configuration; is {folder} a run folder?")
    return load_config(values)


def _find_base(folder: Path, config: RunConfig, moved_to: str | None) -> Path | None:
    """Return the model folder that the run's frozen weights are in."""
    if config.model.path is None:
        if moved_to is not None:
            raise ConfigError(f"base={moved_to}: {folder} was trained from scratch, it has no base")
        return None
    path = Path(moved_to or config.model.path)
    if not (path / "config.json").is_file():
        raise ConfigError(f"{folder} was trained on {path}, which is not there; give base=FOLDER")
    noted = noted_base(folder)
    if noted is not None and noted["identity"] != (now := model_identity(path)):
        raise ConfigError(
            f"{folder} was trained on {noted['name']} (identity {noted['identity'][:12]}), and "
            f"{path} is another model (identity {now[:12]}), to which its adapter does not belong; "
            "give base=FOLDER of the very base, in the same precision"
        )
    return path


def _as_trained(
    config: RunConfig, shape: PreTrainedModel, checkpoint: Checkpoint
) -> Callable[[str, Tensor], Tensor] | None:
    """Return what makes frozen weights those that a run on a quantised base computed with."""
    if config.peft.mode != "qlora":
        return None
    require_bitsandbytes()
    dtype = DTYPES[checkpoint.manifest["precision"]]
    return partial(as_quantized, quantized_weights(shape), config.peft.quantization, dtype)


def _create(config: PretrainedConfig, dtype: torch.dtype, own_code: bool) -> PreTrainedModel:
    """Create the model without drawing initial weights, which would be thrown away."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=own_code)
    model.tie_weights()
    return model


def _fill(model: PreTrainedModel, weights: Weights, folder: Path) -> None:
    """Set every parameter, one at a time, and what the base keeps beside its parameters."""
    params = dict(model.named_parameters())
    if missing := sorted(params.keys() - weights.shapes.keys()):
        raise CheckpointError(
            f"{folder} and its base lack {len(missing)} parameters under the model's names, for "
            f"example {missing[0]}; export the run with `kuroshio export` and load that folder"
        )
    buffers = {n: buffer for n, buffer in model.named_buffers() if n in weights.shapes}
    with torch.no_grad():
        for name, value in {**params, **buffers}.items():
            value.copy_(weights.read(name))
