"""A folder's own names of trained parameters are found, so that exports do not keep both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_models import tiny_model
from transformers import AutoModelForCausalLM

from trainer.models.export import Weights, write_shards
from trainer.models.stored_names import superseded_names


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe", "granitemoe", "llama"])
def test_tuned_model_replaces_what_its_base_holds_under_other_names(
    variant: str, tmp_path: Path
) -> None:
    model = tiny_model(variant)
    base, out = tmp_path / "base", tmp_path / "out"
    model.save_pretrained(base)
    model.config.save_pretrained(out)
    params = dict(model.named_parameters())
    with torch.no_grad():
        for param in params.values():
            param.add_(0.5)
    shapes = {name: list(param.shape) for name, param in params.items()}
    stale = superseded_names(model, base, shapes)
    assert bool(stale) is (variant != "llama")
    weights = Weights(shapes, lambda name: params[name].detach(), base, None, stale)
    write_shards(weights, out, torch.float32, 10**9, lambda shards: shards)
    loaded = AutoModelForCausalLM.from_pretrained(out).named_parameters()
    assert all(torch.equal(param, params[name]) for name, param in loaded)


def test_what_was_not_trained_stays(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path)
    assert not superseded_names(model, tmp_path, ["model.norm.weight"])
    one = superseded_names(
        model, tmp_path, ["base_model.model.model.layers.1.mlp.experts.down_proj"]
    )
    assert one == {f"model.layers.1.block_sparse_moe.experts.{n}.w2.weight" for n in range(4)}
