"""Quantised layers: what they compute, what they keep, and what needs bitsandbytes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.config import ModelConfig
from trainer.errors import ConfigError
from trainer.models.load import load_model, make_config, outline
from trainer.models.quantize import (
    QuantizedLinear,
    as_quantized,
    quantize,
    quantized_weights,
    require_bitsandbytes,
)


def make_layer(kind: Any, dtype: torch.dtype, bias: bool) -> tuple[QuantizedLinear, nn.Linear]:
    """Return a quantised layer and a plain one with the weight it computes with."""
    torch.manual_seed(0)
    plain = nn.Linear(128, 96, bias=bias, dtype=dtype).requires_grad_(False)
    packed, unpack = quantize(plain.weight.data, dtype, kind)
    layer = QuantizedLinear(packed, unpack, (96, 128), plain.bias.data if bias else None)
    plain.weight.data = layer.weight
    return layer, plain


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_computes_with_its_own_weight(kind: Any, dtype: torch.dtype, bias: bool) -> None:
    layer, plain = make_layer(kind, dtype, bias)
    inputs = [torch.randn(3, 5, 128, dtype=dtype).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    outputs = [module(x) for module, x in zip((layer, plain), inputs, strict=True)]
    assert outputs[0].dtype == dtype and torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-2, atol=1e-4)
    assert all(param.grad is None for param in layer.parameters())


@pytest.mark.parametrize(("kind", "num_bytes", "error"), [("nf4", 0.5, 0.12), ("int8", 1, 0.01)])
def test_weight_is_small_and_near_the_original(kind: Any, num_bytes: float, error: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 128)
    packed, unpack = quantize(weight, torch.float32, kind)
    assert packed.numel() * packed.element_size() == num_bytes * weight.numel()
    difference = (unpack(packed) - weight).norm() / weight.norm()
    assert 0.1 * error < difference < error
    assert torch.equal(unpack(packed), as_quantized({"w": False}, kind, torch.float32, "w", weight))
    turned = as_quantized({"w": True}, kind, torch.float32, "w", weight.T)
    assert torch.equal(turned, unpack(packed).T)
    assert as_quantized({}, kind, torch.float32, "w", weight) is weight


def test_backward_keeps_no_copy_of_the_weight() -> None:
    """Under ZeRO-3 a kept copy would hold the gathered weight of every layer until backward."""
    layer, _ = make_layer("nf4", torch.float32, bias=False)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(2, 128).requires_grad_())
    assert kept == []


def test_output_embedding_stays_as_it_is() -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=1,
    )  # fmt: skip
    names = quantized_weights(outline(config))
    assert len(names) == 14 and "lm_head.weight" not in names and not any(names.values())
    gpt2 = AutoConfig.for_model("gpt2", vocab_size=32, n_embd=8, n_layer=1, n_head=1)
    assert all(quantized_weights(AutoModelForCausalLM.from_config(gpt2)).values())


def test_folder_may_hold_more_than_the_model_but_not_other_names(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=1, attention_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(plain.model.layers[0].self_attn.q_proj.bias)
    plain.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    save_file({**stored, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)}, file)
    model = ModelConfig("m", str(tmp_path))
    loaded = load_model(model, make_config(model, 32, {}), torch.float32, 0, None, "int8")
    layer = loaded.model.layers[0].self_attn.q_proj
    assert isinstance(layer, QuantizedLinear)
    assert torch.equal(layer.bias, plain.model.layers[0].self_attn.q_proj.bias)
    assert torch.equal(loaded.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(loaded(ids).logits, plain(ids).logits, rtol=0, atol=2e-2)
    save_file({f"other.{name}": value for name, value in stored.items()}, file)
    with pytest.raises(ConfigError, match="under other names or shapes than LlamaForCausalLM"):
        load_model(model, make_config(model, 32, {}), torch.float32, 0, None, "int8")


def test_missing_library_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    require_bitsandbytes()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'bitsandbytes>=0.48'"):
        require_bitsandbytes()
