"""Floating-point work of a LLaMA-like model and the peak rate of known devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.errors import ConfigError


@dataclass(frozen=True)
class ModelShape:
    """Hyperparameters that decide a decoder's matrix work; names as in transformers' configs."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read a transformers configuration as a mapping (``model.config.to_dict()``).

        Raises:
            ConfigError: when a size is missing, with the names of all that are.
        """
        needed = "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size"
        missing = [key for key in needed.split() if not config.get(key)]
        if missing:
            raise ConfigError(
                f"model configuration has no {', '.join(missing)}: FLOPs are counted for "
                "LLaMA-like decoders only; give these sizes"
            )
        heads = int(config["num_attention_heads"])
        return cls(
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            num_hidden_layers=int(config["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            vocab_size=int(config["vocab_size"]),
            tie_word_embeddings=bool(config.get("tie_word_embeddings")),
        )

    @property
    def attention_width(self) -> int:
        """Features of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def layer_matmul_params(self) -> int:
        """Weights of one layer's matrices: q, k, v, o and the gated MLP's three."""
        queries_and_output = 2 * self.hidden_size * self.attention_width
        keys_and_values = 2 * self.hidden_size * self.num_key_value_heads * self.head_dim
        return queries_and_output + keys_and_values + 3 * self.hidden_size * self.intermediate_size

    @property
    def head_params(self) -> int:
        """Weights of the output embedding, which every token is multiplied with."""
        return self.hidden_size * self.vocab_size

    @property
    def num_params(self) -> int:
        """All parameters: matrices, input embedding (once if tied) and RMS norms."""
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        embeddings = self.head_params * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * self.layer_matmul_params + embeddings + norms


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
        layers=per_weight * shape.num_hidden_layers * shape.layer_matmul_params,
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
