"""What a run reads: its tokenizer, its prepared sources, its base model's files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tokenizer.load import fingerprint
from trainer.config import RunConfig
from trainer.data.prepared.store import TokenStore
from trainer.errors import ConfigError
from trainer.models.identity import model_identity


def tokenizer_path(config: RunConfig) -> str | None:
    """Return the run's tokenizer: its own, else the model folder's."""
    return config.tokenizer.path or config.model.path


def describe_inputs(config: RunConfig, store: TokenStore) -> dict[str, str]:
    """Return identities of the tokenizer, the prepared sources, the base model and the adapter."""
    inputs = {"tokenizer": fingerprint(str(tokenizer_path(config)))}
    for name, source in store.sources.items():
        inputs[f"data.sources.{name}"] = source.folder.name
    if config.model.path:
        inputs["model.path"] = identify_weights(Path(config.model.path))
    if config.peft.adapter:  # a frozen copy of it may be what a policy is compared with
        inputs["peft.adapter"] = identify_adapter(Path(config.peft.adapter))
    return inputs


def identify_adapter(folder: Path) -> str:
    """Return what tells an adapter from others: its weights and its settings."""
    settings = (folder / "adapter_config.json").read_bytes()
    return f"{model_identity(folder)} {hashlib.sha256(settings).hexdigest()}"


def identify_weights(folder: Path) -> str:
    """Return what tells a model's weights from others; of pickled ones only names and sizes."""
    if any(folder.glob("*.safetensors")):
        return model_identity(folder)
    return " ".join(f"{f.name}:{f.stat().st_size}" for f in sorted(folder.glob("*.bin")))


def refuse_changes(before: dict[str, str], now: dict[str, str]) -> None:
    """Refuse to resume on other inputs: rows would silently be others than the loader's state says.

    Raises:
        ConfigError: naming what changed.
    """
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        raise ConfigError(
            f"what this run reads has changed since its checkpoint: {', '.join(changed)} (files, "
            "or how they are read). Bring the old ones back, or start another run_dir from an "
            "export of this run"
        )
