"""How long a step takes: FLOPs at a stated share of the peak, bytes at stated bandwidths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.plan.flops import ModelShape, device_peak, peak_flops_per_s
from trainer.plan.memory import EnginePlan, Model

# With adapters less of the peak is reached: small matrices beside every large one. Middle of
# Qwen-7B's and 14B's published LoRA steps at 2048 to 8192 tokens over what full training's share of
# the peak would give (same source as A100's share below).
ADAPTER_FACTOR = 1.4
# QLoRA computes each weight from its packed form: Qwen-7B's published steps on an A100 take 1.15
# (4096 tokens) to 1.35 times (2048) those of LoRA (QwenLM/Qwen, commit 2df8e8a, README.md).
UNPACKING_FACTOR = 1.25
# Responses are written layer by layer from Python: a token takes at least this for each layer.
# An assumption, not a measurement.
DECODING_S_PER_LAYER = 1e-3


@dataclass(frozen=True)
class Efficiency:
    """The share of its peak that a device reaches in training, recomputed FLOPs included."""

    words: tuple[str, ...]
    share: float
    source: str


# Middles of published runs whose systems are like ours (transformers, ZeRO); docs/planning.md
# compares them with all the others.
EFFICIENCIES = (
    Efficiency(("V100",), 0.35, "Megatron-LM GPT-1.3B, 8 V100, fp16: bigscience tr3m-1B3"),
    Efficiency(("A100",), 0.45, "Qwen-1.8B and 7B, transformers and DeepSpeed: Qwen README"),
    Efficiency(("H100",), 0.40, "llm-foundry MPT 7B to 70B, FSDP: scripts/train/benchmarking"),
    Efficiency(("H200",), 0.40, "taken as H100's, which has the same arithmetic units"),
)
# Adam on the host reads an fp32 weight, gradient and two moments and writes weight, moments and the
# weight in half precision. A core alone is three times as fast (benchmarks/planning.py measures
# it), but all cores of a node share its memory. An assumption.
ADAM_BYTES = 30
ADAM_BYTES_PER_S_PER_CORE = 4e9
# Data sheets: bytes/s of the device's memory. More specific names first.
MEMORY_BYTES_PER_S = (
    (("V100",), 0.9e12),
    (("A100", "40GB"), 1.555e12),
    (("A100",), 2.039e12),
    (("H100",), 3.35e12),
    (("H200",), 4.8e12),
)
# Host link of a GPU, one direction, about 80 % of the PCIe generation's rate.
HOST_BYTES_PER_S = ((("V100",), 12e9), (("A100",), 25e9), (("H100",), 50e9), (("H200",), 50e9))


def words_of(device_name: str) -> set[str]:
    """Return the words of a device's name, in capitals."""
    return set(device_name.upper().replace("-", " ").replace("_", " ").split())


def _find(table: Sequence[tuple[tuple[str, ...], float]], device_name: str) -> float | None:
    words = words_of(device_name)
    return next((value for keys, value in table if words.issuperset(keys)), None)


def find_efficiency(device_name: str) -> Efficiency | None:
    """Return what is assumed of a device; None where nothing is published."""
    words = words_of(device_name)
    return next((entry for entry in EFFICIENCIES if words.issuperset(entry.words)), None)


def memory_bytes_per_s(device_name: str) -> float | None:
    """Return the rate of a device's memory."""
    return _find(MEMORY_BYTES_PER_S, device_name)


def host_bytes_per_s(device_name: str) -> float | None:
    """Return the rate between a device and its host, one direction."""
    return _find(HOST_BYTES_PER_S, device_name)


@dataclass(frozen=True)
class Pass:
    """A model that a step runs over tokens.

    Attributes:
        model: what runs.
        tokens: over all ranks, a step.
        length: tokens of a row, which attention sees on average half of.
        trains: whether a backward pass follows.
    """

    model: Model
    tokens: float
    length: int
    trains: bool = False


def forward_flops(shape: ModelShape, length: int, *, scalar: bool = False) -> float:
    """Return a token's FLOPs forward: 2 a weight, and QKᵀ and AV over half the row."""
    head = 0 if scalar else shape.head_params
    attention = 4 * shape.num_hidden_layers * shape.attention_width * (length + 1) / 2
    return 2.0 * (shape.matmul_params + head) + attention


def pass_flops(one: Pass, *, recomputes: bool) -> float:
    """Return the FLOPs of a pass over all its tokens.

    A backward pass costs one forward for the gradients of inputs and, for the share of weights
    that is trained, another (arXiv:2001.08361, eq. 2.2). Recomputed layers cost a forward more.
    """
    shape, scalar = one.model.shape, one.model.scalar
    forward = forward_flops(shape, one.length, scalar=scalar)
    if not one.trains:
        return one.tokens * forward
    counted = one.model.counts
    whole = shape.matmul_params + (0 if scalar else shape.head_params)
    own = counted.trained_matrices * shape.matmul_params / max(1, _matrices(shape))
    trained = own + counted.trained_head + counted.by_kind.get("adapter", 0)
    # A tied or frozen head's own gradient is in trained_head only where the head has its own rows.
    attention = forward - 2.0 * whole
    total = forward + (2 * whole + 2 * min(trained, whole)) + 2 * attention
    if recomputes:
        total += forward - (0 if scalar else 2 * shape.head_params)
    return one.tokens * total


def _matrices(shape: ModelShape) -> int:
    """Return the weights of all layers' matrices, all experts counted."""
    embeddings = shape.head_params * (1 if shape.tie_word_embeddings else 2)
    small = shape.num_small_params
    if small is None:
        small = (2 * shape.num_hidden_layers + 1) * shape.hidden_size
    return shape.num_params - embeddings - small


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends in a step."""

    network: float
    host: float


def step_traffic(
    passes: Sequence[Pass],
    engine: EnginePlan,
    world_size: int,
    *,
    trained: int,
    micro_tokens: int,
    optimizer_steps: int = 1,
) -> Traffic:
    """Return what a rank sends to the others and to its host in a step.

    Volumes are those of ring collectives (ZeRO, arXiv:1910.02054, section 7), in the types this
    engine sends: gradients of bf16 travel as fp32; ZeRO-1 and 2 reduce by all-reduce.

    Args:
        passes: of the step.
        engine: how the models are held.
        world_size: number of ranks.
        trained: parameters that are trained.
        micro_tokens: tokens that a rank computes at once.
        optimizer_steps: updates.
    """
    share = (world_size - 1) / world_size
    backwards, gathered = 0, 0.0
    for one in passes:
        times = math.ceil(one.tokens / (world_size * micro_tokens))
        backwards = max(backwards, times * one.trains)
        counted = one.model.counts
        weights = counted.plain * engine.element_bytes + counted.packed_bytes
        gathered += weights * times * (2 if one.trains else 1)
    gradients = trained * (2 if engine.precision == "fp16" else 4) * share
    updated = trained * engine.element_bytes * share
    if engine.zero_stage == 0:
        network = 2 * gradients * optimizer_steps
    elif engine.zero_stage == 1:
        network = (2 * gradients + updated) * optimizer_steps
    elif engine.zero_stage == 2:
        network = 2 * gradients * backwards + updated * optimizer_steps
    else:
        network = gradients * backwards + gathered * share
    host = 0.0
    if engine.offload_optimizer != "none":
        per_parameter = 4 * backwards + engine.element_bytes * optimizer_steps
        host += trained / world_size * per_parameter
    if engine.offload_params != "none":
        host += gathered / world_size
    return Traffic(network, host)


def network_bytes_per_s(
    intra_gb: float | None, inter_gb: float | None, nodes: int, num_ranks: int
) -> float | None:
    """Return what limits a ring through all GPUs; None where it is unknown.

    Args:
        intra_gb: GB/s of a GPU to its node's GPUs.
        inter_gb: GB/s of a GPU's share of its node's network.
        nodes: of the run.
        num_ranks: of a node.
    """
    inside = intra_gb if num_ranks > 1 else float("inf")
    # A ring crosses between nodes once for all GPUs of a node, which share their links.
    outside = None if inter_gb is None else inter_gb * num_ranks
    between = outside if nodes > 1 else float("inf")
    if inside is None or between is None:
        return None
    return min(inside, between) * 1e9


def compute_seconds(
    flops: float, device_name: str | None, precision: str, efficiency: float | None, num_gpus: int
) -> float | None:
    """Return how long all GPUs together compute ``flops``; None where the device is unknown."""
    if device_name is None or device_peak(device_name) is None or efficiency is None:
        return None
    peak = peak_flops_per_s(device_name, precision)
    return None if peak is None else flops / (peak * efficiency * num_gpus)


def decoding_seconds(
    model: Model, engine: EnginePlan, device_name: str | None, num_tokens: int, cache: float
) -> float | None:
    """Return how long one batch of responses takes to write, token by token.

    Each token reads all weights and half of the final cache, or waits for Python.

    Args:
        model: the policy.
        engine: its precision.
        device_name: the GPU.
        num_tokens: of the longest response.
        cache: bytes of keys and values when all are written.
    """
    rate = memory_bytes_per_s(device_name) if device_name else None
    if rate is None:
        return None
    counted = model.counts
    read = counted.plain * engine.element_bytes + counted.packed_bytes + cache / 2
    return num_tokens * max(read / rate, DECODING_S_PER_LAYER * model.shape.num_hidden_layers)
