"""What is known of each model family: how packed documents stay apart, what LoRA adapts.

The table is data; ``tests/trainer/models/test_families.py`` proves every row of it on a tiny model
of the family, in both directions, and writes docs/models.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

# How the documents of one row are kept apart:
#   kernel     our attention: document by document, or the device's kernel for uneven lengths
#   positions  transformers' own whole-row mask, made from position ids
#   mask       a whole-row mask of ours, where the model hands no position ids to transformers'
#   none       they are not: one document to a row, padded
Isolation = Literal["kernel", "positions", "mask", "none"]

ALL_LINEAR = "all-linear"  # peft's word for every linear layer but the output embedding

_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
_LATENT = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
_FUSED = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
_CONV1D = ("c_attn", "c_proj", "c_fc")
_EXPERTS = "LoRA leaves the experts as they are"


@dataclass(frozen=True)
class Family:
    """One model_type.

    Attributes:
        model_type: as in config.json.
        models: names people know, for the table.
        isolation: how packed documents stay apart.
        lora_targets: linear layers of attention and MLP; ``ALL_LINEAR`` where they are not known.
        remark: what a user should know.
    """

    model_type: str
    models: str
    isolation: Isolation
    lora_targets: tuple[str, ...] | str
    remark: str = ""


_TABLE = (
    Family("llama", "LLaMA 1-3.x, TAIDE, Breeze, Yi, Vicuna", "kernel", _QKVO + _GATED),
    Family("mistral", "Mistral, Breeze-7B", "kernel", _QKVO + _GATED),
    Family("ministral3", "Ministral 3", "kernel", _QKVO + _GATED),
    Family("mixtral", "Mixtral", "kernel", _QKVO, _EXPERTS),
    Family("qwen2", "Qwen 1.5, 2, 2.5", "kernel", _QKVO + _GATED),
    Family("qwen2_moe", "Qwen 1.5-MoE, Qwen 2-MoE", "kernel", _QKVO + _GATED, _EXPERTS),
    Family("qwen3", "Qwen 3", "kernel", _QKVO + _GATED),
    Family("qwen3_moe", "Qwen 3-MoE", "kernel", _QKVO, _EXPERTS),
    Family("phi", "Phi-1, 1.5, 2", "kernel", ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")),
    Family(
        "phi3",
        "Phi-3, Phi-4",
        "kernel",
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    ),
    Family("phimoe", "Phi-3.5-MoE", "kernel", _QKVO, _EXPERTS),
    Family("falcon", "Falcon", "mask", _FUSED, "with alibi (Falcon-RW): padded"),
    Family("bloom", "BLOOM, BLOOMZ", "none", _FUSED, "its alibi counts from the row's start"),
    Family("glm", "GLM-4-9B", "kernel", (*_QKVO, "gate_up_proj", "down_proj")),
    Family("glm4", "GLM-4-0414", "kernel", (*_QKVO, "gate_up_proj", "down_proj")),
    Family("gemma", "Gemma 1", "kernel", _QKVO + _GATED),
    Family("gemma2", "Gemma 2", "positions", _QKVO + _GATED, "soft caps need plain attention"),
    Family("gemma3_text", "Gemma 3", "kernel", _QKVO + _GATED),
    Family("internlm3", "InternLM 3", "kernel", _QKVO + _GATED),
    Family("olmo", "OLMo", "kernel", _QKVO + _GATED),
    Family("olmo2", "OLMo 2", "kernel", _QKVO + _GATED),
    Family("olmo3", "OLMo 3", "kernel", _QKVO + _GATED),
    Family("olmoe", "OLMoE", "kernel", _QKVO, _EXPERTS),
    Family("granite", "Granite 3", "kernel", _QKVO + _GATED),
    Family("granitemoe", "Granite 3-MoE", "kernel", _QKVO, _EXPERTS),
    Family("starcoder2", "StarCoder 2", "kernel", (*_QKVO, "c_fc", "c_proj")),
    Family("stablelm", "StableLM", "kernel", _QKVO + _GATED),
    Family("cohere", "Command R", "kernel", _QKVO + _GATED),
    Family("cohere2", "Command R7B, Aya", "kernel", _QKVO + _GATED),
    Family("smollm3", "SmolLM 3", "kernel", _QKVO + _GATED),
    Family("seed_oss", "Seed-OSS", "kernel", _QKVO + _GATED),
    # Not the MLP: peft 0.21 takes its names for those of the fused experts of these two.
    Family("deepseek_v2", "DeepSeek-V2", "kernel", _LATENT, "LoRA adapts attention only"),
    Family("deepseek_v3", "DeepSeek-V3", "kernel", _LATENT, "LoRA adapts attention only"),
    Family("gpt_oss", "gpt-oss", "none", _QKVO, _EXPERTS),
    Family("gpt2", "GPT-2", "kernel", _CONV1D),
    Family("gpt_neox", "Pythia, GPT-NeoX", "kernel", _FUSED),
    Family("opt", "OPT", "kernel", ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")),
    Family("mpt", "MPT", "mask", ("Wqkv", "out_proj", "up_proj", "down_proj")),
)
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _TABLE}


def find_family(config: Mapping[str, Any]) -> Family | None:
    """Return what is known of an architecture, None for a model_type that the table lacks.

    Args:
        config: config.json as a mapping (``model.config.to_dict()``).
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is not None and family.model_type == "falcon" and config.get("alibi"):
        return replace(family, isolation="none", remark="its alibi counts from the row's start")
    return family


def isolates_documents(config: Mapping[str, Any]) -> bool:
    """Return whether documents packed into one row are kept apart; if not, pad them.

    An architecture that is not in the table is not trusted to.

    Args:
        config: config.json as a mapping (``model.config.to_dict()``).
    """
    family = find_family(config)
    return family is not None and family.isolation != "none"


def lora_targets(config: Mapping[str, Any]) -> tuple[str, ...] | str:
    """Return the names of the layers LoRA adapts by default, or ``ALL_LINEAR``.

    Args:
        config: config.json as a mapping (``model.config.to_dict()``).
    """
    family = find_family(config)
    return family.lora_targets if family else ALL_LINEAR


@dataclass(frozen=True)
class RemoteFamily:
    """A family that transformers has no code for: its model folder brings its own.

    Attributes:
        models: names people know.
        llama: how its weights become a folder of a native family; empty where they cannot.
    """

    models: str
    llama: str


# What each differs in is read from vLLM's and SGLang's implementations and from public converters.
REMOTE_FAMILIES = (
    RemoteFamily("Baichuan-7B", "split W_pack into q, k and v: LLaMA"),
    RemoteFamily("Baichuan2-7B", "the same, with the rows of lm_head normalised: LLaMA"),
    RemoteFamily("Baichuan-13B, Baichuan2-13B", ""),
    RemoteFamily("ChatGLM3", ""),
    RemoteFamily("InternLM 1", "rename model_type, attention_bias=true: LLaMA"),
    RemoteFamily("InternLM 2, 2.5", "split wqkv by groups, rename: LLaMA"),
    RemoteFamily("Qwen 1", "split c_attn, w1 is up and w2 gate, rename: LLaMA with attention_bias"),
    RemoteFamily("XVERSE", "rename model_type: LLaMA"),
    RemoteFamily("Yuan 2", ""),
)
