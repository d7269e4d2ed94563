"""A tiny configuration of every model family, with its peculiarities switched on."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from trainer.models.attention import use_document_attention

VOCAB = 96
WINDOW = 6  # tokens of a sliding window: shorter than the tests' documents
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OLD = dict.fromkeys(("intermediate_size", "num_key_value_heads"))  # families without these keys
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
SLIDING = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
# Variant -> (model_type, sizes). A family may have several: all rows of docs/models.md.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-biased": ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "ministral3": ("ministral3", {"head_dim": 8}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen2-sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16},
    ),
    "phi": ("phi", {}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phimoe": ("phimoe", {"num_local_experts": 4}),
    "falcon": ("falcon", OLD),
    "falcon-40b": ("falcon", {**OLD, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": ("falcon", {**OLD, "alibi": True, "parallel_attn": False, "bias": True}),
    "bloom": ("bloom", OLD),
    "glm": ("glm", {"head_dim": 8}),
    "glm4": ("glm4", {"head_dim": 8}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16, **SLIDING}),
    "gemma3_text": ("gemma3_text", {"head_dim": 16, **SLIDING}),
    "internlm3": ("internlm3", {"head_dim": 8, "bias": True, "qkv_bias": True}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", SLIDING),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("granite", {"logits_scaling": 8.0, "attention_multiplier": 0.2}),
    "granitemoe": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "starcoder2": ("starcoder2", {"sliding_window": WINDOW}),
    "stablelm": ("stablelm", {}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", SLIDING),
    "smollm3": ("smollm3", {}),
    "seed_oss": ("seed_oss", {"head_dim": 8}),
    "deepseek_v2": ("deepseek_v2", LATENT),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "gpt_oss": (
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, **SLIDING},
    ),
    "gpt2": ("gpt2", OLD),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": None}),
    "opt": ("opt", {**OLD, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "mpt": ("mpt", {**OLD, "max_seq_len": 128}),
}


def tiny_config(variant: str, **changes: Any) -> PretrainedConfig:
    """Return the tiny configuration of a variant."""
    model_type, sizes = TINY[variant]
    values = {**SIZES, **sizes, **changes}
    present = {key: value for key, value in values.items() if value is not None}
    return AutoConfig.for_model(model_type, **present)


def tiny_model(variant: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a random model of a variant, in evaluation mode, with the attention of training."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(variant), dtype=dtype)
    use_document_attention(model)
    with torch.no_grad():  # their usual 0.02 would let no attention be seen
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.eval()
