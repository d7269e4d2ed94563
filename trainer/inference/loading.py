"""Models to talk to: a model folder, a run, or a base with an adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tokenizer.load import JSON_NAME, load_tokenizer, sentencepiece_file
from tokenizer.pair import check_pair
from trainer.config import ModelConfig
from trainer.data.chats.chat import resolve_template
from trainer.engine.precision import DTYPES, native_precision
from trainer.errors import ConfigError
from trainer.inference.chat_model import ChatModel
from trainer.inference.run_model import RUN_CONFIG, find_run_checkpoint, load_run
from trainer.models.adapter_files import CONFIG_NAME as ADAPTER_NAME
from trainer.models.adapter_files import AdapterFiles
from trainer.models.identity import model_identity
from trainer.models.load import load_model, make_config

RUN_KEYS = {  # as errors of the parts that training uses name them, and what they are called here
    "data.template": "template",
    "model.trust_remote_code": "trust_remote_code",
    "model.revision": "revision",
    "model.path": "MODEL",
}


@dataclass(frozen=True)
class Loading:
    """How a model is loaded.

    Attributes:
        base: base folder of an adapter or of a run whose base has moved.
        step: checkpoint of a run; None = the newest.
        template: chat template: auto = the tokenizer's own; a built-in name; a .jinja file.
        precision: of the weights; auto = what the device computes natively.
        device: auto = a GPU if there is one; or cpu, cuda, cuda:1 …
        trust_remote_code: run code that a model folder brings, if it is that of ``revision``.
        revision: SHA-256 over that code.
    """

    base: str | None = None
    step: int | None = None
    template: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    revision: str | None = None

    def problems(self) -> list[str]:
        """Return values that make no sense, alone or together."""
        if self.step is not None and self.step < 0:
            return [f"step={self.step}: expected 0 or more"]
        return []


class _Loaded(NamedTuple):
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    identity: str


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
    with _naming_own_keys():
        loaded = load(folder, loading, DTYPES[precision])
        loaded.tokenizer.chat_template = resolve_template(loaded.tokenizer, loading.template)
    name = folder.resolve().name
    return ChatModel(loaded.model.to(device), loaded.tokenizer, name, loaded.identity)


@contextmanager
def _naming_own_keys() -> Iterator[None]:
    """Let errors name the keys given here, not those of a run's config."""
    try:
        yield
    except ConfigError as error:
        text = str(error)
        for theirs, ours in RUN_KEYS.items():
            text = text.replace(theirs, ours)
        raise ConfigError(text) from error


def find_kind(folder: Path) -> Literal["run", "adapter", "model"]:
    """Tell a run, an adapter and a model folder apart.

    Raises:
        ConfigError: it is none of them.
    """
    if (folder / RUN_CONFIG).is_file():
        return "run"
    if (folder / ADAPTER_NAME).is_file():
        return "adapter"
    if (folder / "config.json").is_file():
        return "model"
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else ""
    seen = f"it holds {there or 'nothing'}" if folder.is_dir() else "there is no such folder"
    raise ConfigError(
        f"MODEL={folder}: {seen}; give a model folder (with config.json), a run folder (with "
        f"{RUN_CONFIG}) or a peft adapter (with {ADAPTER_NAME})"
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


def _load_folder(folder: Path, loading: Loading, dtype: torch.dtype) -> _Loaded:
    if loading.base is not None or loading.step is not None:
        raise ConfigError(
            f"base={loading.base} step={loading.step}: {folder} is a whole model folder; base "
            "belongs to adapters and runs, step to runs"
        )
    model = read_model(folder, loading, dtype)
    return _Loaded(model, load_tokenizer(folder), model_identity(folder))


def _load_run(folder: Path, loading: Loading, dtype: torch.dtype) -> _Loaded:
    if loading.trust_remote_code:
        raise ConfigError(
            f"trust_remote_code=true: {folder} is a run, whose config says whether its model's "
            "code may run"
        )
    checkpoint = find_run_checkpoint(folder, loading.step)
    model, tokenizer = load_run(folder, loading.base, checkpoint, dtype)
    manifest = (checkpoint.path / "manifest.json").read_bytes()
    return _Loaded(model, tokenizer, hashlib.sha256(manifest).hexdigest())


def _load_adapter(folder: Path, loading: Loading, dtype: torch.dtype) -> _Loaded:
    from peft import PeftModel

    if loading.step is not None:
        raise ConfigError(f"step={loading.step}: {folder} is an adapter, and only runs have steps")
    adapter = AdapterFiles.open(folder)
    base = Path(loading.base or adapter.config.get("base_model_name_or_path") or "")
    if not (base / "config.json").is_file():
        raise ConfigError(
            f"{folder} is an adapter of the model {base}, which is not there; give base=FOLDER"
        )
    adapter.check_base(base)
    has_own = (folder / JSON_NAME).is_file() or sentencepiece_file(folder) is not None
    place = folder if has_own else base
    check_pair(base, place)
    adapted = PeftModel.from_pretrained(read_model(base, loading, dtype), folder)
    identity = f"{model_identity(base)} {model_identity(folder)}"
    return _Loaded(adapted.merge_and_unload(), load_tokenizer(place), identity)


def read_model(folder: Path, loading: Loading, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model folder through transformers, without network.

    Raises:
        ConfigError: transformers cannot load it, or it needs code that was not allowed.
    """
    named = ModelConfig(
        folder.name,
        str(folder),
        trust_remote_code=loading.trust_remote_code,
        revision=loading.revision,
    )
    try:
        return load_model(named, make_config(named, 0, {}), dtype, seed=0)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder} cannot be loaded: {error}") from error


_LOADERS: dict[str, Callable[[Path, Loading, torch.dtype], _Loaded]] = {
    "run": _load_run,
    "adapter": _load_adapter,
    "model": _load_folder,
}
