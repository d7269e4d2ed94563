"""A model's architecture as plain data, without torch: planning reads it on login nodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizer.hub import how_to_fetch
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
        how = how_to_fetch(str(model.path)) or "; give the folder of a model"
        raise ConfigError(f"model.path={model.path} is no model folder: {error}{how}") from error
    return architecture
