"""What ``trainer.plan`` says of the cases that benchmarks/planning.py measures. Without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.plan.activations import (
    Micro,
    backward_bytes,
    kept_bytes,
    last_norm_bytes,
    loss_bytes,
)
from trainer.plan.flops import ModelShape
from trainer.plan.memory import ELEMENT_BYTES, EnginePlan, Model, state_bytes
from trainer.plan.parameters import Tuning

Sizes = dict[str, Any]
SMALL: Sizes = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
LORA_RANK = 8


@dataclass(frozen=True)
class StateCase:
    """An engine to measure."""

    zero_stage: int
    precision: str
    lora: bool = False

    def __str__(self) -> str:
        return f"ZeRO-{self.zero_stage} {self.precision}{' lora' if self.lora else ''}"


# ZeRO-3 last: models that are made after it in the same process are split as well.
STATE_CASES = (
    StateCase(2, "bf16", lora=True),
    *(StateCase(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")),
)


@dataclass(frozen=True)
class PeakCase:
    """A forward and backward pass to measure."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rows: int
    length: int
    precision: str
    again: bool

    @property
    def sizes(self) -> Sizes:
        """The model's architecture."""
        names = ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"]
        names += ["num_attention_heads", "num_key_value_heads"]
        kind = {"model_type": "llama", "tie_word_embeddings": False}
        return kind | {name: getattr(self, name) for name in names}


SHAPES = (
    (256, 688, 6, 8, 8, 4096, 4, 512),
    (512, 1376, 4, 8, 2, 8192, 2, 1024),
    (256, 688, 12, 4, 4, 2048, 8, 256),
    (384, 1536, 8, 6, 6, 16000, 2, 512),
)
PEAK_CASES = tuple(
    PeakCase(*shape, precision, again)
    for shape in SHAPES
    for precision in ("fp32", "bf16")
    for again in (False, True)
)


def planned_states(case: StateCase) -> dict[str, int]:
    """Return the planned bytes of weights, gradients and optimizer of one rank."""
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    tuning = Tuning("lora", rank=LORA_RANK, targets=targets) if case.lora else Tuning()
    engine = EnginePlan(case.zero_stage, case.precision)  # type: ignore[arg-type]
    gpu = state_bytes([Model("policy", SMALL, tuning)], engine, 1).gpu
    names = {"weights": "weights: policy", "gradients": "gradients", "optimizer": "optimizer"}
    return {part: round(gpu[name]) for part, name in names.items()}


def planned_peak(case: PeakCase) -> float:
    """Return the planned bytes that a forward and backward pass adds."""
    shape = ModelShape.from_config(case.sizes)
    micro = Micro(case.rows * case.length, ELEMENT_BYTES[case.precision], case.again)
    kept = kept_bytes(shape, micro)
    loss = last_norm_bytes(shape, micro) + loss_bytes(shape, micro, head_trained=True)
    return kept + max(loss, backward_bytes(shape, micro))
