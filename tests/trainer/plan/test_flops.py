"""FLOPs against a count of the model's own matrices, and the device table."""

import pytest

from trainer.errors import ConfigError
from trainer.plan.flops import (
    DEVICE_PEAKS,
    ModelShape,
    device_peak,
    flops_per_token,
    peak_flops_per_s,
)

LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}


def test_parameters_of_llama_2_7b() -> None:
    assert ModelShape.from_config(LLAMA_2_7B).num_params == 6_738_415_616


def test_parameters_and_work_agree_with_a_real_model() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        vocab_size=512,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    shape = ModelShape.from_config(config.to_dict())
    assert shape.num_params == sum(p.numel() for p in model.parameters())
    seq_length = 64
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, seq_length, dtype=torch.long), use_cache=False).logits.sum().backward()
    flops = flops_per_token(shape, seq_length)
    # Eager attention computes all keys, a causal model needs (seq_length + 1) / 2 of them.
    full_attention = flops.attention * seq_length / ((seq_length + 1) / 2)
    computed = (flops.layers + full_attention + flops.head) * seq_length
    assert counter.get_total_flops() == pytest.approx(computed, rel=0.002)  # rotary tables


def test_parts_by_hand() -> None:
    shape = ModelShape(8, 16, 2, 2, 1, 4, 100)
    assert shape.matmul_params == 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)
    flops = flops_per_token(shape, 7)
    assert flops.layers == 6 * 2 * 576
    assert flops.head == 6 * 800
    assert flops.attention == 12 * 2 * 8 * 4
    assert flops.total == flops.layers + flops.head + flops.attention
    frozen = flops_per_token(shape, 7, trained_share=0.0)
    assert frozen.layers == 4 * 2 * 576 and frozen.attention == flops.attention


def test_missing_sizes_are_named() -> None:
    with pytest.raises(ConfigError, match="has no intermediate_size, vocab_size"):
        ModelShape.from_config({"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1})


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("Tesla V100-PCIE-16GB", "fp16", 112),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835),
        ("NVIDIA H200", "fp16", 989.4),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA L40S", "bf16", 362.1),
        ("NVIDIA GeForce MX150", "fp16", None),
        ("cpu", "fp32", None),
    ],
)
def test_device_peaks(name: str, precision: str, tera: float | None) -> None:
    expected = None if tera is None else pytest.approx(tera * 1e12)
    assert peak_flops_per_s(name, precision) == expected


def test_every_entry_is_found_by_its_own_words() -> None:
    for peak in DEVICE_PEAKS:
        assert device_peak(" ".join(peak.words)) == peak
        assert peak.source
