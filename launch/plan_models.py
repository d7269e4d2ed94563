"""The models of a run by their sizes, read from config.json and tokenizer files without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config import PeftConfig, RunConfig
from trainer.errors import ConfigError
from trainer.models.architecture import read_architecture
from trainer.models.families import ALL_LINEAR, lora_targets
from trainer.plan.memory import Model
from trainer.plan.parameters import Tuning


def planned_architecture(config: RunConfig) -> dict[str, Any]:
    """Return the architecture with its vocabulary's rows: a tokenizer's, for a new model.

    Raises:
        ConfigError: nothing says how many rows there are.
    """
    model = config.model
    architecture = read_architecture(model)
    if model.path is not None or "vocab_size" in architecture:
        return architecture
    path = config.tokenizer.path
    if path is None:
        raise ConfigError(
            "model.architecture.vocab_size is not set and tokenizer.path is null: nothing says how "
            "many rows the vocabulary has; give +model.architecture.vocab_size=ROWS"
        )
    rows = -(-num_ids(Path(path)) // model.pad_vocab_to) * model.pad_vocab_to
    return {**architecture, "vocab_size": rows}


def num_ids(path: Path) -> int:
    """Return how many ids a tokenizer has, without loading it as one."""
    try:
        described = path / "tokenizer.json" if path.is_dir() else path
        if described.suffix == ".json" and described.is_file():
            tokenizer = json.loads(described.read_text(encoding="utf-8"))
            vocabulary = tokenizer["model"]["vocab"]
            ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
            return 1 + max([*ids, *(token["id"] for token in tokenizer["added_tokens"])])
        from sentencepiece import SentencePieceProcessor

        model = path / "tokenizer.model" if path.is_dir() else path
        return int(SentencePieceProcessor(model_file=str(model)).get_piece_size())
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ConfigError(
            f"tokenizer.path={path}: its ids cannot be counted ({error}); give a tokenizer, or "
            "+model.architecture.vocab_size=ROWS"
        ) from error


def _tuning(peft: PeftConfig, architecture: Mapping[str, Any]) -> Tuning:
    targets: Any = peft.target_modules
    if targets == "auto":
        targets = lora_targets(architecture)
    return Tuning(
        mode=peft.mode,
        trainable=peft.trainable,
        trainable_layers=peft.trainable_layers,
        rank=_adapter_rank(peft),
        dora=peft.dora,
        targets=None if targets in (ALL_LINEAR, "all-linear") else tuple(targets),
        train_embeddings=peft.train_embeddings,
        quantization=peft.quantization,
    )


def _adapter_rank(peft: PeftConfig) -> int:
    """Return the rank of new adapters, or of the one that is continued."""
    if peft.adapter is None:
        return peft.rank
    path = Path(peft.adapter) / "adapter_config.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["r"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"peft.adapter={peft.adapter} is no adapter folder: {error}") from error


def make_model(config: RunConfig, role: str, **kind: Any) -> Model:
    """Return a model of the model group, trained as the peft group says."""
    architecture = planned_architecture(config)
    peft = config.peft
    return Model(
        role,
        architecture,
        _tuning(peft, architecture),
        quantization=peft.quantization if peft.mode == "qlora" else None,
        **kind,
    )
