"""Models to talk to: a model folder, a run, or a base with an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tokenizer.load import JSON_NAME, check_pair, load_tokenizer, sentencepiece_file
from trainer.data.chat import resolve_template
from trainer.engine.precision import DTYPES, native_precision
from trainer.errors import ConfigError
from trainer.inference.chat_model import ChatModel
from trainer.inference.run_model import RUN_CONFIG, load_run

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Loading:
    """How a model is loaded.

    Attributes:
        base: base folder of an adapter or of a run whose base has moved.
        step: checkpoint of a run; None = the newest.
        template: chat template: auto = the tokenizer's own; a built-in name; a .jinja file.
        precision: of the weights; auto = what the device computes natively.
        device: auto = a GPU if there is one; or cpu, cuda, cuda:1 …
    """

    base: str | None = None
    step: int | None = None
    template: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: str = "auto"

    def problems(self) -> list[str]:
        """Return values that make no sense, alone or together."""
        if self.step is not None and self.step < 0:
            return [f"step={self.step}: expected 0 or more"]
        return []


def load_chat_model(folder: Path, loading: Loading, local_rank: int = 0) -> ChatModel:
    """Load a model folder, a run folder or a peft adapter folder, with its chat template.

    Args:
        folder: what to load.
        loading: how.
        local_rank: index of the GPU that ``device=auto`` takes.

    Raises:
        ConfigError: the folder is none of the three, or a setting does not fit it.
        CheckpointError: the run has no complete checkpoint.
        DataError: a file that cannot be read.
    """
    device = choose_device(loading.device, local_rank)
    precision = native_precision() if loading.precision == "auto" else loading.precision
    if loading.precision == "auto" and device.type == "cpu" and precision == "fp16":
        precision = "fp32"  # a GPU is there, but not asked for
    load = _LOADERS[find_kind(folder)]
    model, tokenizer = load(folder, loading, DTYPES[precision])
    try:
        tokenizer.chat_template = resolve_template(tokenizer, loading.template)
    except ConfigError as error:  # it names the key of a run's config
        raise ConfigError(str(error).replace("data.template", "template")) from error
    return ChatModel(model.to(device), tokenizer, folder.resolve().name)


def find_kind(folder: Path) -> Literal["run", "adapter", "model"]:
    """Tell a run, an adapter and a model folder apart.

    Raises:
        ConfigError: it is none of them.
    """
    if (folder / RUN_CONFIG).is_file():
        return "run"
    if (folder / ADAPTER_CONFIG).is_file():
        return "adapter"
    if (folder / "config.json").is_file():
        return "model"
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else ""
    seen = f"it holds {there or 'nothing'}" if folder.is_dir() else "there is no such folder"
    raise ConfigError(
        f"MODEL={folder}: {seen}; give a model folder (with config.json), a run folder (with "
        f"{RUN_CONFIG}) or a peft adapter (with {ADAPTER_CONFIG})"
    )


def choose_device(asked: str, local_rank: int) -> torch.device:
    """Return the device that ``asked`` names; ``auto`` is this rank's GPU, else the CPU.

    Raises:
        ConfigError: it is no device, or is not there.
    """
    if asked == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    try:
        device = torch.device(asked)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device={asked}: {reason}; use auto, cpu or cuda:N") from error
    return device


def _load_folder(
    folder: Path, loading: Loading, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    if loading.base is not None or loading.step is not None:
        raise ConfigError(
            f"base={loading.base} step={loading.step}: {folder} is a whole model folder; base "
            "belongs to adapters and runs, step to runs"
        )
    return read_model(folder, dtype), load_tokenizer(folder)


def _load_run(
    folder: Path, loading: Loading, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    return load_run(folder, loading.base, loading.step, dtype)


def _load_adapter(
    folder: Path, loading: Loading, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    from peft import PeftModel

    if loading.step is not None:
        raise ConfigError(f"step={loading.step}: {folder} is an adapter, and only runs have steps")
    named = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = Path(loading.base or named.get("base_model_name_or_path") or "")
    if not (base / "config.json").is_file():
        raise ConfigError(
            f"{folder} is an adapter of the model {base}, which is not there; give base=FOLDER"
        )
    has_own = (folder / JSON_NAME).is_file() or sentencepiece_file(folder) is not None
    place = folder if has_own else base
    check_pair(base, place)
    try:
        adapted = PeftModel.from_pretrained(read_model(base, dtype), folder)
    except (RuntimeError, ValueError) as error:  # shapes or modules that the base does not have
        raise ConfigError(
            f"the adapter {folder} does not fit base={base}: {error}; give the base that it was "
            "trained on"
        ) from error
    return adapted.merge_and_unload(), load_tokenizer(place)


def read_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model folder through transformers, without network.

    Raises:
        ConfigError: transformers cannot load it.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder} cannot be loaded: {error}") from error


_Load = Callable[[Path, Loading, torch.dtype], tuple[PreTrainedModel, PreTrainedTokenizerFast]]
_LOADERS: dict[str, _Load] = {"run": _load_run, "adapter": _load_adapter, "model": _load_folder}
