"""Floating-point work of a decoder and the peak rate of known devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from trainer.errors import ConfigError
from trainer.plan.architectures import (
    NAMES,
    Architecture,
    find_architecture,
    num_dense_layers,
    num_key_value_heads,
    read_size,
)


@dataclass(frozen=True)
class ModelShape:
    """Sizes that decide a decoder's parameters and matrix work; names as in transformers' configs.

    Attributes:
        num_mlp_matrices: 3 with a gate, else 2.
        num_dense_layers: layers without experts, in a mixture; None: all layers.
        num_experts, num_experts_per_tok: of the other layers.
        expert_size, shared_expert_size: widths of one expert, and of those that every token takes.
        shared_gate: whether the shared expert has a gate of its own.
        num_small_params: norms, biases and positions; None counts LLaMA's RMS norms.
        latent_attention: matrix weights of one layer's attention and the features its scores
            and averages are taken over, where both are not made of heads x head_dim (MLA).
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool = False
    num_mlp_matrices: int = 3
    num_dense_layers: int | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 0
    expert_size: int = 0
    shared_expert_size: int = 0
    shared_gate: bool = False
    num_small_params: int | None = None
    latent_attention: tuple[int, float] | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read a transformers configuration as a mapping (``model.config.to_dict()``).

        Raises:
            ConfigError: when a size is missing, with the names of all that are.
        """
        kind = find_architecture(config)
        sizes = {name: read_size(config, name) for name in NAMES}
        if kind.fourfold and not sizes["intermediate_size"]:
            sizes["intermediate_size"] = 4 * sizes["hidden_size"]
        needed = "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size"
        missing = [key for key in needed.split() if not sizes[key]]
        if missing:
            raise ConfigError(
                f"model configuration has no {', '.join(missing)}: FLOPs are counted for "
                "LLaMA-like decoders only; give these sizes"
            )
        heads = sizes["num_attention_heads"]
        shape = cls(
            hidden_size=sizes["hidden_size"],
            intermediate_size=sizes["intermediate_size"],
            num_hidden_layers=sizes["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=num_key_value_heads(config),
            head_dim=int(config.get("head_dim") or sizes["hidden_size"] // heads),
            vocab_size=sizes["vocab_size"],
            tie_word_embeddings=bool(config.get("tie_word_embeddings", kind.tied)),
            num_mlp_matrices=3 if kind.gated else 2,
            **(_read_experts(config, sizes) if sizes["num_experts"] else {}),
        )
        if config.get("kv_lora_rank"):
            shape = replace(shape, latent_attention=_read_latent(config, shape))
        return replace(shape, num_small_params=_count_small(config, kind, shape))

    @property
    def attention_width(self) -> float:
        """Features of all query heads together."""
        return self.latent_attention[1] if self.latent_attention else self._query_width

    @property
    def _query_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def attention_params(self) -> int:
        """Weights of one layer's matrices q, k, v and o."""
        if self.latent_attention:
            return self.latent_attention[0]
        key_width = self.num_key_value_heads * self.head_dim
        return 2 * self.hidden_size * (self._query_width + key_width)

    @property
    def dense_layers(self) -> int:
        """Layers with a plain MLP."""
        return self.num_hidden_layers if self.num_dense_layers is None else self.num_dense_layers

    def _matmul_params(self, num_experts: int) -> int:
        width = num_experts * self.expert_size + self.shared_expert_size
        gate = self.num_experts + self.shared_gate
        expert_layer = self.hidden_size * (self.num_mlp_matrices * width + gate)
        dense_layer = self.hidden_size * self.num_mlp_matrices * self.intermediate_size
        return (
            self.num_hidden_layers * self.attention_params
            + self.dense_layers * dense_layer
            + (self.num_hidden_layers - self.dense_layers) * expert_layer
        )

    @property
    def matmul_params(self) -> int:
        """Weights of all layers' matrices that a token is multiplied with."""
        return self._matmul_params(self.num_experts_per_tok)

    @property
    def head_params(self) -> int:
        """Weights of the output embedding, which every token is multiplied with."""
        return self.hidden_size * self.vocab_size

    @property
    def num_params(self) -> int:
        """All parameters; an output embedding tied to the input embedding counts once."""
        small = self.num_small_params
        if small is None:
            small = (2 * self.num_hidden_layers + 1) * self.hidden_size
        embeddings = self.head_params * (1 if self.tie_word_embeddings else 2)
        return self._matmul_params(self.num_experts) + embeddings + small


def _read_experts(config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    expert_size = int(config.get("moe_intermediate_size") or sizes["intermediate_size"])
    shared = int(config.get("shared_expert_intermediate_size") or 0)
    return {
        "num_dense_layers": num_dense_layers(config),
        "num_experts": sizes["num_experts"],
        "num_experts_per_tok": int(config.get("num_experts_per_tok") or 1),
        "expert_size": expert_size,
        "shared_expert_size": shared or int(config.get("n_shared_experts") or 0) * expert_size,
        "shared_gate": bool(shared),
    }


def _read_latent(config: Mapping[str, Any], shape: ModelShape) -> tuple[int, float]:
    """Return weights and width of multi-head latent attention (arXiv:2405.04434, eq. 9 to 19)."""
    heads, hidden = shape.num_attention_heads, shape.hidden_size
    plain, rotary = int(config["qk_nope_head_dim"]), int(config["qk_rope_head_dim"])
    value, rank = int(config["v_head_dim"]), int(config["kv_lora_rank"])
    query_rank = int(config.get("q_lora_rank") or 0)
    from_query = query_rank or hidden
    weights = hidden * query_rank + from_query * heads * (plain + rotary)
    weights += hidden * (rank + rotary) + rank * heads * (plain + value) + heads * value * hidden
    return weights, heads * (plain + rotary + value) / 2


def _count_small(config: Mapping[str, Any], kind: Architecture, shape: ModelShape) -> int:
    """Count norms, biases and learned positions."""

    def has(bias: bool | str) -> bool:
        return bool(config.get(bias)) if isinstance(bias, str) else bias

    hidden, query = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    key = shape.num_key_value_heads * shape.head_dim
    layer = kind.norms * kind.norm_vectors * hidden
    layer += {"": 0, "head": 2 * shape.head_dim, "width": query + key}[kind.qk_norm]
    layer += has(kind.qkv_bias) * (query + 2 * key) + has(kind.out_bias) * hidden
    if shape.latent_attention:
        layer += int(config["kv_lora_rank"]) + int(config.get("q_lora_rank") or 0)
    if kind.sinks:
        layer += shape.num_attention_heads
        layer += shape.num_experts * (2 * shape.expert_size + hidden + 1)
    mlp = (shape.num_mlp_matrices - 1) * shape.intermediate_size + hidden
    total = shape.num_hidden_layers * layer + shape.dense_layers * has(kind.mlp_bias) * mlp
    total += (1 + kind.embedding_norm) * kind.norm_vectors * hidden
    if kind.position_rows is not None:
        total += (read_size(config, "max_position_embeddings") + kind.position_rows) * hidden
    return total + has(kind.head_bias) * shape.vocab_size


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of one token, forward and backward, by part."""

    layers: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        """FLOPs per token."""
        return self.layers + self.attention + self.head


def flops_per_token(shape: ModelShape, seq_length: int, trained_share: float = 1.0) -> TokenFlops:
    """Count the FLOPs one token of a training step needs.

    A matrix weight costs 2 FLOPs forward, 2 for the gradient of its input and 2 for its own: the
    6N of Kaplan et al. 2020 (arXiv:2001.08361, eq. 2.2), here with the vocabulary head and without
    the input embedding, which is a look-up. Attention adds QKᵀ and AV: 12·layers·width·keys
    (PaLM, arXiv:2204.02311, appendix B) with the (seq_length + 1)/2 keys a causal token sees on
    average instead of all. Recomputed activations do not count: this is model, not hardware, work.

    Args:
        shape: the model's sizes.
        seq_length: tokens of a row; rows of isolated documents need less.
        trained_share: share of matrix weights that get a gradient (LoRA, freeze: below 1).
    """
    per_weight = 4 + 2 * trained_share
    keys = (seq_length + 1) / 2
    return TokenFlops(
        layers=per_weight * shape.matmul_params,
        attention=12 * shape.num_hidden_layers * shape.attention_width * keys,
        head=per_weight * shape.head_params,
    )


@dataclass(frozen=True)
class DevicePeak:
    """Dense peak rates of a device in TFLOP/s; None where it does not compute the type."""

    name: str
    words: tuple[str, ...]  # all occur in the driver's device name
    fp16: float
    bf16: float | None
    fp32: float
    source: str


# More specific names first: the first entry whose words all occur wins. Rates are dense (without
# structured sparsity) with fp32 accumulation, fp32 without TF32, as the makers state them.
DEVICE_PEAKS = (
    DevicePeak("B200", ("B200",), 2250, 2250, 75, "NVIDIA Blackwell architecture brief, 2024"),
    DevicePeak("H200", ("H200",), 989.4, 989.4, 66.9, "NVIDIA H200 data sheet, 2024"),
    DevicePeak("H100 NVL", ("H100", "NVL"), 835, 835, 60, "NVIDIA H100 NVL data sheet, 2024"),
    DevicePeak("H100 PCIe", ("H100", "PCIe"), 756, 756, 51, "NVIDIA H100 data sheet, 2023"),
    DevicePeak("H100 SXM", ("H100",), 989.4, 989.4, 66.9, "NVIDIA H100 data sheet, 2023"),
    DevicePeak("GH200", ("GH200",), 989.4, 989.4, 66.9, "NVIDIA GH200 data sheet, 2023"),
    DevicePeak("A100", ("A100",), 312, 312, 19.5, "NVIDIA A100 data sheet, 2021"),
    DevicePeak("A40", ("A40",), 149.7, 149.7, 37.4, "NVIDIA A40 data sheet, 2021"),
    DevicePeak("L40S", ("L40S",), 362.1, 362.1, 91.6, "NVIDIA L40S data sheet, 2023"),
    DevicePeak("L4", ("L4",), 121, 121, 30.3, "NVIDIA L4 data sheet, 2023"),
    DevicePeak("A10", ("A10",), 125, 125, 31.2, "NVIDIA A10 data sheet, 2021"),
    DevicePeak("T4", ("T4",), 65, None, 8.1, "NVIDIA T4 data sheet, 2019"),
    DevicePeak("V100 PCIe", ("V100", "PCIE"), 112, None, 14, "NVIDIA V100 data sheet, 2020"),
    DevicePeak("V100 SXM2", ("V100",), 125, None, 15.7, "NVIDIA V100 data sheet, 2020"),
    DevicePeak("MI300X", ("MI300X",), 1307.4, 1307.4, 163.4, "AMD MI300X data sheet, 2023"),
    DevicePeak("MI250X GCD", ("MI250X",), 191.5, 191.5, 23.95, "AMD MI250X data sheet, 2021"),
)


def device_peak(device_name: str) -> DevicePeak | None:
    """Return the entry of the device the driver calls ``device_name``, None if unknown.

    Words match whole, so that "A100" is not taken for an A10.
    """
    parts = set(device_name.upper().replace("-", " ").replace("_", " ").split())
    for peak in DEVICE_PEAKS:
        if parts.issuperset(word.upper() for word in peak.words):
            return peak
    return None


def peak_flops_per_s(device_name: str, precision: str) -> float | None:
    """Return the peak FLOP/s of a device for ``fp32``, ``fp16`` or ``bf16``; None if unknown."""
    peak = device_peak(device_name)
    if peak is None:
        return None
    tera = {"fp32": peak.fp32, "fp16": peak.fp16, "bf16": peak.bf16}[precision]
    return None if tera is None else tera * 1e12
