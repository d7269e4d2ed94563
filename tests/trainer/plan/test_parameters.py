"""A decoder's parameters against transformers' own, and which of them are trained."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.inputs.llama_2_7b import LLAMA_2_7B
from trainer.errors import ConfigError
from trainer.plan.flops import ModelShape
from trainer.plan.memory import Model
from trainer.plan.parameters import Tuning, list_parameters, trained_names

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_names_and_shapes_are_those_of_transformers(model_type: str, tied: bool) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {k: v for k, v in TINY.items() if k != "model_type"}
    settings |= {"tie_word_embeddings": tied, "head_dim": 8}
    config = AutoConfig.for_model(model_type, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    real = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = list_parameters(config.to_dict())
    others = [p for p in found if p.name == "others"]  # biases, norms of heads
    assert all(real[p.name] == p.shape for p in found if p not in others)
    assert sum(p.numel for p in found) == sum(p.numel() for p in model.parameters())


def test_vocabulary_rows_are_counted_by_part() -> None:
    counts = Model("policy", LLAMA_2_7B, Tuning()).counts
    assert counts.by_kind["embedding"] == counts.by_kind["head"] == 55296 * 4096
    assert counts.total == counts.trained == 6_738_415_616 + 2 * (55296 - 32000) * 4096


def test_lora_of_a_7b_model() -> None:
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    counts = Model("policy", LLAMA_2_7B, Tuning("lora", rank=16, targets=targets)).counts
    # 4 matrices of 4096 x 4096 and 3 of 4096 x 11008 a layer: 16 rows and columns of each.
    assert counts.trained == 32 * 16 * (4 * 8192 + 3 * (4096 + 11008))
    with_rows = Tuning("lora", rank=16, targets=targets, train_embeddings=True)
    assert Model("p", LLAMA_2_7B, with_rows).counts.trained == counts.trained + 2 * 55296 * 4096


def test_packed_matrices_take_half_a_byte() -> None:
    counts = Model("policy", LLAMA_2_7B, Tuning("qlora"), quantization="nf4").counts
    assert counts.packed == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert counts.packed_bytes / counts.packed == pytest.approx(0.5159, abs=1e-4)
    assert counts.plain == counts.total - counts.packed


def test_frozen_parts_are_found_by_name() -> None:
    own = list_parameters(TINY)
    embeddings = trained_names(Tuning("freeze", trainable="embed_tokens|lm_head"), own, 3)
    assert embeddings == {"model.embed_tokens.weight", "lm_head.weight"}
    last = trained_names(Tuning("freeze", trainable_layers=1), own, 3)
    assert last and all(name.startswith("model.layers.2.") for name in last)
    with pytest.raises(ConfigError, match=r"peft\.trainable=.nothing. matches no parameter"):
        trained_names(Tuning("freeze", trainable="nothing"), own, 3)
    with pytest.raises(ConfigError, match="no valid regex"):
        trained_names(Tuning("freeze", trainable="("), own, 3)


def test_scalar_models_have_one_row_for_a_head() -> None:
    whole, scalar = list_parameters(TINY), list_parameters(TINY, scalar=True)
    assert sum(p.numel for p in whole) - sum(p.numel for p in scalar) == 96 * 32 - 32
    frozen = Tuning("lora", targets=("q_proj",))
    assert trained_names(frozen, scalar, 3, scalar=True) == {"score.weight"}


def test_experts_are_counted_whole() -> None:
    mixture = TINY | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    found = list_parameters(mixture)
    assert sum(p.numel for p in found) == ModelShape.from_config(mixture).num_params
