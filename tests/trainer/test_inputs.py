"""What a run reads, told apart by content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trainer.config import load_config
from trainer.data.prepared.prepare import open_store
from trainer.errors import ConfigError
from trainer.inputs import describe_inputs, refuse_changes
from trainer.models.identity import refuse_other_base


def test_other_weights_of_the_same_size_are_refused(
    vary: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    values = vary(tmp_path / "run")
    values["model"] = {"name": "base", "path": str(tmp_path)}
    config = load_config(values)
    store = open_store(config.data, str(config.tokenizer.path))
    weight = torch.zeros(300, 400)
    seen = []
    for last in (0.0, 0.0, 1.0):
        weight[-1, -1] = last
        save_file({"weight": weight}, tmp_path / "model.safetensors")
        seen.append(describe_inputs(config, store))
    refuse_changes(seen[0], seen[1])
    with pytest.raises(ConfigError, match=r"has changed since its checkpoint: model\.path \(files"):
        refuse_changes(seen[1], seen[2])
    values["peft"] = {"mode": "lora", "adapter": str(tmp_path)}
    (tmp_path / "adapter_config.json").write_text("{}")
    config = load_config(values)
    before = describe_inputs(config, store)
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    with pytest.raises(ConfigError, match=r"changed since its checkpoint: peft\.adapter \(files"):
        refuse_changes(before, describe_inputs(config, store))
    refuse_other_base(tmp_path, seen[2])
    with pytest.raises(ConfigError, match="has changed since the run was trained on it"):
        refuse_other_base(tmp_path, seen[1])
