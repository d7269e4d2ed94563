"""Models from a folder or from scratch, ready for any ZeRO stage.

Under ZeRO-3 parameters are split over the ranks as their modules are constructed and filled one at
a time, so that no rank ever holds the whole model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import initialize_weights_zero3

from trainer.config import ModelConfig
from trainer.errors import ConfigError
from trainer.models.architecture import read_architecture
from trainer.models.filling import Fill, Made, Trimming, fill_plain, return_freed_memory
from trainer.models.pickled import only_tensors
from trainer.models.quantize import Quantization, quantize_layers
from trainer.models.remote_code import refuse_fetched_kernels, runs_own_code
from trainer.models.shards import open_tensors

LOG = logging.getLogger(__name__)
LANGUAGE = AutoModelForCausalLM
CLASSIFIER = "ForSequenceClassification"  # ends the names of their classes


def special_ids(tokenizer: Any) -> dict[str, int | None]:
    """Return the ids of a tokenizer's start, end and padding token, by their names in configs."""
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: getattr(tokenizer, key) for key in keys}


def make_config(
    model: ModelConfig, num_tokens: int, special_ids: dict[str, Any]
) -> PretrainedConfig:
    """Return the transformers config of the run's model.

    Args:
        model: the model group.
        num_tokens: tokenizer ids; a model from scratch gets that many rows, rounded up.
        special_ids: bos, eos and pad ids for a model from scratch.

    Raises:
        ConfigError: no such model, already quantised, or with code that was not allowed.
    """
    architecture = read_architecture(model)
    refuse_fetched_kernels(architecture, f"model.path={model.path}")
    if model.path is not None:
        if "quantization_config" in architecture:
            raise ConfigError(
                f"model.path={model.path} is already quantised "
                f"({architecture['quantization_config'].get('quant_method')}); give the "
                "unquantised model, which peft=qlora quantises while loading"
            )
        own_code = runs_own_code(model, architecture)
        return AutoConfig.from_pretrained(
            model.path, local_files_only=True, trust_remote_code=own_code
        )
    model_type = architecture.pop("model_type")
    rows = -(-num_tokens // model.pad_vocab_to) * model.pad_vocab_to
    return AutoConfig.for_model(model_type, **{**architecture, "vocab_size": rows, **special_ids})


def outline(config: PretrainedConfig, auto: Any = LANGUAGE) -> PreTrainedModel:
    """Return the model without its numbers: modules, names, shapes and ties.

    Args:
        config: from ``make_config``, which has checked code of the model's own.
        auto: transformers' class of the kind of model.
    """
    with torch.device("meta"), no_init_weights():
        model = auto.from_config(config, trust_remote_code=_brings_code(config))
    model.tie_weights()
    return model


def _brings_code(config: PretrainedConfig) -> bool:
    """Return whether the config was made by code of the model's own, which was then allowed."""
    return type(config).__module__.startswith("transformers_modules.")


def initial_buffers(config: PretrainedConfig, auto: Any = LANGUAGE) -> dict[str, torch.Tensor]:
    """Return the tensors that a new model keeps beside its parameters, such as a router's bias.

    Checkpoints hold parameters only; a model from a folder has these tensors there.
    """
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = auto.from_config(config, trust_remote_code=_brings_code(config))
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def find_aliases(config: PretrainedConfig, auto: Any = LANGUAGE) -> set[str]:
    """Return the second names of parameters that the model ties."""
    model = outline(config, auto)
    names = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - names


def measure(config: PretrainedConfig, auto: Any = LANGUAGE) -> tuple[int, int]:
    """Return (all parameters, elements of the largest one), from shapes alone."""
    sizes = [p.numel() for p in outline(config, auto).parameters()]
    return sum(sizes), max(sizes)


class Partitioning(Protocol):
    """What the engine offers to load a model that no rank holds whole (ZeRO-3)."""

    def construction(self) -> AbstractContextManager[None]:
        """Split parameters as they are constructed."""

    def transformers_loading(self) -> AbstractContextManager[None]:
        """Let transformers split what it loads."""

    def fill(self, param: torch.nn.Parameter, read: Callable[[], torch.Tensor]) -> None:
        """Set a split parameter from its full value."""


def load_model(
    model: ModelConfig,
    config: PretrainedConfig,
    dtype: torch.dtype,
    seed: int,
    partitioning: Partitioning | None = None,
    quantization: Quantization | None = None,
    auto: Any = LANGUAGE,
    made: Mapping[str, Made] = MappingProxyType({}),
) -> PreTrainedModel:
    """Load or create the model in ``dtype``; the same weights on every rank and ZeRO stage.

    A quantised model is not split here: the engine does it.

    Args:
        model: the model group.
        config: from ``make_config``.
        dtype: of the weights.
        seed: of the initial weights of a model from scratch.
        partitioning: the engine's, under ZeRO-3.
        quantization: of the linear layers of a model folder.
        auto: transformers' class of the kind of model.
        made: parameters that the kind has and the folder lacks, by name.

    Raises:
        ConfigError: a classifier where a language model is wanted.
    """
    kinds = [name for name in config.architectures or [] if name.endswith(CLASSIFIER)]
    if auto is LANGUAGE and kinds:
        raise ConfigError(
            f"model.path={model.path} is a classifier ({kinds[0]}), without an output embedding to "
            "write text with; give a language model"
        )
    if quantization is not None:
        partitioning = None
    fill = partitioning.fill if partitioning else fill_plain
    if model.path is not None and partitioning is None and quantization is None and not made:
        return _from_folder(model.path, config, dtype, auto, made, fill)
    # Constructors would draw numbers and fill memory that are thrown away.
    with partitioning.construction() if partitioning else nullcontext(), no_init_weights():
        created: PreTrainedModel = auto.from_config(
            config, dtype=dtype, trust_remote_code=_brings_code(config)
        )
    if model.path is None:
        _initialise(created, seed, partitioning is not None)
        for name, value in made.items():
            fill(created.get_parameter(name), value.make)
    elif quantization is not None:
        _quantize(created, Path(model.path), dtype, quantization, made)
    elif not _stream(created, Path(model.path), fill, made):
        LOG.warning(
            "the parameters of %s are stored under other names or shapes: transformers converts "
            "them and may need memory for a whole copy per rank",
            model.path,
        )
        with partitioning.transformers_loading() if partitioning else nullcontext():
            return _from_folder(model.path, config, dtype, auto, made, fill)
    return created


def _from_folder(
    path: str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    auto: Any,
    made: Mapping[str, Made],
    fill: Fill,
) -> PreTrainedModel:
    with only_tensors(Path(path)):
        loaded: PreTrainedModel = auto.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=_brings_code(config),
        )
    for name, value in made.items():
        fill(loaded.get_parameter(name), value.make)
    return loaded


def _initialise(model: PreTrainedModel, seed: int, partitioned: bool) -> None:
    """Draw the initial weights, in the same order with and without ZeRO-3."""
    torch.manual_seed(seed)
    with torch.no_grad():
        initialize_weights_zero3(model) if partitioned else model.initialize_weights()
    model.tie_weights()


def _stream(model: PreTrainedModel, folder: Path, fill: Fill, made: Mapping[str, Made]) -> bool:
    """Fill a model one parameter at a time; return False if its files name others."""
    stored = _open_matching(model, folder, made)
    if stored is None:
        return False
    trim = Trimming()
    for name, param in model.named_parameters():
        fill(param, partial(stored[name].get_tensor, name))
        trim(math.prod(_shape(param)) * param.element_size())
    return True


def _quantize(
    model: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype,
    quantization: Quantization,
    made: Mapping[str, Made],
) -> None:
    """Fill a model, its linear layers quantised.

    Raises:
        ConfigError: its files name other parameters.
    """
    stored = _open_matching(model, folder, made)
    if stored is None:
        raise ConfigError(
            f"model.path={folder}: its files hold parameters under other names or shapes than "
            f"{type(model).__name__}, so they cannot be quantised one by one. Loading and saving "
            "it once with transformers' save_pretrained renames them, except in mixtures of "
            "experts; or use peft=lora"
        )
    quantize_layers(model, stored, dtype, quantization, Trimming())
    return_freed_memory()


def _open_matching(
    model: PreTrainedModel, folder: Path, made: Mapping[str, Made]
) -> dict[str, Any] | None:
    """Return the open file of every parameter, or None if the files name others.

    What the files hold beside them (old LLaMA files have rotary frequencies) is not read.
    """
    model.tie_weights()
    params = dict(model.named_parameters())
    stored: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = open_tensors(path)
        stored.update(dict.fromkeys(file.keys(), file))
    same = all(
        n in made or (n in stored and stored[n].get_slice(n).get_shape() == _shape(p))
        for n, p in params.items()
    )
    return stored | dict(made) if same else None


def _shape(param: torch.nn.Parameter) -> list[int]:
    """Return the shape of a parameter, split by ZeRO-3 or not."""
    return list(vars(param).get("ds_shape", param.shape))
