"""How the families of decoders differ in what their layers hold: sizes' names, biases, norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]

# A size's name in transformers' configs, then the older families' names for it.
NAMES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    "vocab_size": ("vocab_size",),
    "num_experts": ("num_local_experts", "num_experts", "n_routed_experts"),
}


@dataclass(frozen=True)
class Architecture:
    """What a layer holds beside its matrices.

    A name stands for the config key that says whether there is a bias.

    Attributes:
        norms: norms of a layer.
        norm_vectors: vectors of a norm: 1 scale, 2 scale and shift, 0 neither.
        qk_norm: norms of queries and keys: by "head", over the "width" of all heads, or "".
        qkv_bias, out_bias, mlp_bias, head_bias: biases.
        gated: whether the MLP has three matrices, else two.
        fourfold: whether the MLP is four times as wide as the layer unless the config says so.
        position_rows: rows of a learned position embedding beyond the longest input; None: none.
        embedding_norm: whether a norm follows the embedding.
        tied: whether the embeddings are one matrix unless the config says so.
        sinks: whether each head has a sink, and experts and router have biases (gpt-oss).
    """

    norms: int = 2
    norm_vectors: int = 1
    qk_norm: str = ""
    qkv_bias: bool | str = "attention_bias"
    out_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = "mlp_bias"
    head_bias: bool | str = False
    gated: bool = True
    fourfold: bool = False
    position_rows: int | None = None
    embedding_norm: bool = False
    tied: bool = False
    sinks: bool = False


def _biased(bias: bool | str = True, **rest: Any) -> Architecture:
    """Return a decoder of the older kind: layer norms, biases, a plain MLP."""
    rest = {"norm_vectors": 2, "gated": False, **rest}
    return Architecture(qkv_bias=bias, out_bias=bias, mlp_bias=bias, **rest)


_QWEN2 = Architecture(qkv_bias=True, out_bias=False)
_ARCHITECTURES = {
    "qwen2": _QWEN2,
    "qwen2_moe": _QWEN2,
    "qwen3": Architecture(qk_norm="head"),
    "qwen3_moe": Architecture(qk_norm="head"),
    "phi": _biased(norms=1, head_bias=True),
    "phimoe": Architecture(norm_vectors=2, head_bias="lm_head_bias"),
    "bloom": _biased(fourfold=True, embedding_norm=True, tied=True),
    "glm": Architecture(out_bias=False),
    "glm4": Architecture(norms=4, out_bias=False),
    "gemma": Architecture(tied=True),
    "gemma2": Architecture(norms=4, tied=True),
    "gemma3_text": Architecture(norms=4, qk_norm="head", tied=True),
    "olmo": Architecture(norm_vectors=0),
    "olmo2": Architecture(qk_norm="width"),
    "olmo3": Architecture(qk_norm="width"),
    "olmoe": Architecture(qk_norm="width"),
    "starcoder2": _biased("use_bias", tied=True),
    "cohere": Architecture(norms=1, tied=True),
    "cohere2": Architecture(norms=1, tied=True),
    "smollm3": Architecture(tied=True),
    "seed_oss": Architecture(out_bias="attention_out_bias"),
    "gpt2": _biased(fourfold=True, position_rows=0, tied=True),
    "gpt_neox": _biased(),
    "opt": _biased(position_rows=2, tied=True),
    "gpt_oss": Architecture(sinks=True),
    "mpt": Architecture(gated=False, fourfold=True, tied=True),
}


def find_architecture(config: Config) -> Architecture:
    """Return how a configuration's layers are made; LLaMA's way for an unknown model_type."""
    model_type = config.get("model_type")
    if model_type == "falcon":
        return _falcon(config)
    if model_type == "stablelm":
        norms = 1 if config.get("use_parallel_residual") else 2
        return Architecture(norms, norm_vectors=2, qkv_bias="use_qkv_bias", out_bias=False)
    return _ARCHITECTURES.get(str(model_type), Architecture())


def _falcon(config: Config) -> Architecture:
    two = bool(config.get("new_decoder_architecture")) or not config.get("parallel_attn", True)
    if config.get("num_ln_in_parallel_attn") == 1:
        two = False
    return _biased("bias", norms=1 + two, fourfold=True, tied=True)


def read_size(config: Config, name: str) -> int:
    """Return a size under any of its names, 0 when the config has none of them."""
    return next((int(config[key]) for key in NAMES[name] if config.get(key)), 0)


def num_key_value_heads(config: Config) -> int:
    """Return how many heads keys and values have."""
    if config.get("model_type") == "falcon" and not config.get("new_decoder_architecture"):
        return 1 if config.get("multi_query", True) else read_size(config, "num_attention_heads")
    return read_size(config, "num_key_value_heads") or read_size(config, "num_attention_heads")


def num_dense_layers(config: Config) -> int:
    """Return how many layers of a mixture of experts have a plain MLP."""
    step = int(config.get("decoder_sparse_step") or 1)
    plain = set(config.get("mlp_only_layers") or ())
    plain |= set(range(int(config.get("first_k_dense_replace") or 0)))
    layers = range(read_size(config, "num_hidden_layers"))
    return sum(i in plain or (i + 1) % step != 0 for i in layers)
