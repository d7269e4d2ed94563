"""The first update in low precision is Adam's own, whatever optimizer DeepSpeed wraps around it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_support import read_masters, run_scenarios

from tokenizer.load import load_tokenizer, num_ids
from trainer.config import load_config
from trainer.models.load import load_model, make_config


def test_first_bf16_update_has_the_size_of_the_learning_rate(
    vary: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Bias-corrected, Adam's first step is lr * g / |g|: a step counted before it shrinks that."""
    lr = 1e-3
    scenarios = [
        {
            "config": vary(
                tmp_path / f"zero{stage}",
                engine__zero_stage=stage,
                engine__precision="bf16",
                optim__lr=lr,
                schedule__name="constant",
                schedule__warmup_steps=0,
                loop__max_steps=1,
            )
        }
        for stage in range(4)
    ]
    done = run_scenarios(scenarios, 1, tmp_path)
    assert done.returncode == 0, done.stdout
    config = load_config(scenarios[0]["config"])
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    num_tokens = num_ids(load_tokenizer(str(config.tokenizer.path)))
    shape = make_config(config.model, num_tokens, special)
    model = load_model(config.model, shape, torch.bfloat16, config.loop.seed)
    before = model.model.layers[0].mlp.up_proj.weight.detach().float()
    for stage in range(4):
        after = read_masters(tmp_path / f"zero{stage}")["model.layers.0.mlp.up_proj.weight"]
        assert float((after - before).abs().median()) == pytest.approx(lr, rel=0.01), stage
