"""Bytes of a run's models on each GPU, in host memory and on disk, as this engine holds them.

What DeepSpeed keeps for each way to train was measured on real engines, tensor by tensor:
``tests/trainer/plan/test_measured_memory.py`` compares these functions with them, byte by byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from trainer.plan.flops import ModelShape
from trainer.plan.parameters import (
    Parameter,
    Tuning,
    adapter_parameters,
    list_parameters,
    trained_names,
)

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
MASTER_AND_MOMENTS = 12  # bytes a trained parameter: fp32 weight, Adam's two moments
SUB_GROUP_ELEMENTS = 10**9  # of parameters that DeepSpeed brings back from a disk together
Place = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True)
class EnginePlan:
    """What of the engine group decides memory and speed.

    Attributes:
        bucket_elements: gradients that are reduced together.
    """

    zero_stage: int
    precision: Literal["fp32", "bf16", "fp16"]
    offload_optimizer: Place = "none"
    offload_params: Place = "none"
    activation_checkpointing: bool = False
    bucket_elements: int = 50_000_000

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight that is computed with."""
        return ELEMENT_BYTES[self.precision]


@dataclass(frozen=True, eq=False)
class Model:
    """One model in the engine.

    Attributes:
        role: policy, critic, reference or reward.
        config: its architecture, as transformers writes it.
        tuning: what of it is trained; None: frozen.
        scalar: whether its head is one output.
        num_adapters: sets of low-rank matrices on it that are trained (a critic may share the
            policy's backbone).
        frozen_adapters: such sets that are not trained.
        quantization: storage of its linear layers, nf4 or int8; None: the engine's precision.
    """

    role: str
    config: Mapping[str, Any]
    tuning: Tuning | None = None
    scalar: bool = False
    num_adapters: int = 1
    frozen_adapters: int = 0
    quantization: str | None = None

    @cached_property
    def shape(self) -> ModelShape:
        """Its sizes."""
        return ModelShape.from_config(self.config)

    @cached_property
    def counts(self) -> Counts:
        """Its parameters, counted."""
        return _count(self)


@dataclass(frozen=True)
class Counts:
    """Parameters of one model: all own ones, adapters, trained ones; bytes of frozen packed ones.

    Attributes:
        by_kind: of all parameters, adapters among them.
        trained: elements that get gradients.
        plain: elements stored in the engine's precision.
        packed: elements stored in 4 or 8 bits.
        packed_bytes: what those take.
        largest: elements of the largest parameter that is trained.
    """

    by_kind: Mapping[str, int]
    trained: int
    plain: int
    packed: int = 0
    packed_bytes: float = 0.0
    largest: int = 0
    trained_head: int = 0
    trained_matrices: int = 0

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.by_kind.values())


def _count(model: Model) -> Counts:
    """Count the parameters of a model.

    Raises:
        ConfigError: when the configuration lacks a size, or the tuning matches nothing.
    """
    own = list_parameters(model.config, scalar=model.scalar)
    tuning = model.tuning
    layers = model.shape.num_hidden_layers
    trained = trained_names(tuning, own, layers, scalar=model.scalar) if tuning else set[str]()
    adapters = adapter_parameters(tuning, own) if tuning and tuning.adapts else []
    num_adapters = sum(p.numel for p in adapters)
    packed = [p for p in own if model.quantization and _is_packed(p)]
    names = trained | {p.name for p in adapters}
    by_kind: dict[str, int] = {}
    for parameter in own:
        by_kind[parameter.kind] = by_kind.get(parameter.kind, 0) + parameter.numel
    if adapters:
        by_kind["adapter"] = num_adapters * (model.num_adapters + model.frozen_adapters)
    num_packed = sum(p.numel for p in packed)
    return Counts(
        by_kind=by_kind,
        trained=sum(p.numel for p in own if p.name in trained) + num_adapters * model.num_adapters,
        plain=sum(by_kind.values()) - num_packed,
        packed=num_packed,
        packed_bytes=sum(_packed_bytes(p, str(model.quantization)) for p in packed),
        largest=max((p.numel for p in (*own, *adapters) if p.name in names), default=0),
        trained_head=sum(p.numel for p in own if p.name in trained and p.kind == "head"),
        trained_matrices=sum(p.numel for p in own if p.name in trained and p.kind == "matrix"),
    )


def _is_packed(parameter: Parameter) -> bool:
    return (
        parameter.kind == "matrix"
        and len(parameter.shape) == 2
        and ".experts" not in parameter.name
    )


def _packed_bytes(parameter: Parameter, quantization: str) -> float:
    """Return the bytes of a quantised matrix (NF4 with double quantisation, arXiv:2305.14314)."""
    if quantization == "int8":
        return parameter.numel + 4 * parameter.shape[0]
    blocks = parameter.numel / 64
    return parameter.numel / 2 + blocks + 4 * blocks / 256


@dataclass(frozen=True)
class StateBytes:
    """What weights, gradients and optimizer take, before any activation.

    Attributes:
        gpu: bytes on a GPU by part.
        host: bytes of host memory for one GPU's rank by part.
        nvme: bytes on a node-local disk for one GPU's rank.
        step: bytes that a GPU needs beside them while the optimizer steps.
    """

    gpu: Mapping[str, float]
    host: Mapping[str, float] = field(default_factory=dict)
    nvme: float = 0.0
    step: float = 0.0


def state_bytes(models: Sequence[Model], engine: EnginePlan, world_size: int) -> StateBytes:
    """Return what the models of one engine take on one of ``world_size`` ranks.

    Sources: Rajbhandari et al., ZeRO (arXiv:1910.02054), section 3 and figure 1, for what is split;
    DeepSpeed 0.19.8 as measured for what is kept.
    """
    counts = {model.role: model.counts for model in models}
    trained = sum(c.trained for c in counts.values())
    gpu: dict[str, float] = {}
    host: dict[str, float] = {}
    nvme = 0.0
    split_weights = world_size if engine.zero_stage == 3 else 1
    for role, counted in counts.items():
        weights = (counted.plain * engine.element_bytes + counted.packed_bytes) / split_weights
        if engine.offload_params == "none":
            gpu[f"weights: {role}"] = weights
        elif engine.offload_params == "cpu":
            host[f"weights: {role}"] = weights
        else:
            nvme += weights
    states, gradients = (
        _optimizer(engine, trained, world_size),
        _gradients(engine, trained, world_size),
    )
    if engine.offload_optimizer == "none":
        gpu |= {"gradients": gradients, "optimizer": states}
        step = _step_bytes(engine, trained, world_size)
        return StateBytes(gpu, host, nvme, step)
    # On its way to the host a gradient passes through a buffer as large as the largest.
    gpu["gradients"] = float(engine.element_bytes * max(c.largest for c in counts.values()))
    if engine.zero_stage == 1:
        gpu["gradients"] += float(engine.element_bytes * trained)
    host["gradients"] = _host_gradients(engine, trained, world_size)
    if engine.offload_optimizer == "cpu":
        host["optimizer"] = states
    else:
        nvme += states
        # Weight, gradient, two moments and a spare, of one group of parameters at a time.
        host["buffers of the disk"] = 5.0 * 4 * min(trained / world_size, SUB_GROUP_ELEMENTS)
    return StateBytes(gpu, host, nvme)


def _optimizer(engine: EnginePlan, trained: int, world_size: int) -> float:
    """Return the bytes of fp32 weights and Adam's moments on a rank."""
    if engine.zero_stage == 0:
        # In fp32 the weights themselves are the masters.
        return float(trained * (8 if engine.precision == "fp32" else MASTER_AND_MOMENTS))
    return trained * MASTER_AND_MOMENTS / world_size


def _gradients(engine: EnginePlan, trained: int, world_size: int) -> float:
    """Return the bytes of gradients that outlive a backward pass."""
    if engine.zero_stage == 0:
        return float(trained * engine.element_bytes)
    if engine.zero_stage == 1 and engine.precision == "bf16":
        return float(trained * (4 + 2))  # an fp32 sum of all, and the last backward's
    return float(4 * trained) if engine.zero_stage == 1 else 4 * trained / world_size


def _host_gradients(engine: EnginePlan, trained: int, world_size: int) -> float:
    """Return the gradients that the host keeps: the sum, and what Adam reads, both fp32.

    ZeRO-1 and 2 also keep the updated weights there, on their way back.
    """
    returning = engine.element_bytes if engine.zero_stage < 3 else 0
    return (4 + 4 + returning) * trained / world_size


def _step_bytes(engine: EnginePlan, trained: int, world_size: int) -> float:
    """Return what exists only while the optimizer steps: fp32 copies of gradients."""
    if engine.zero_stage == 0:
        return float(0 if engine.precision == "fp32" else 4 * trained)
    return 4 * trained / world_size


def bucket_bytes(engine: EnginePlan, num_params: int, world_size: int) -> float:
    """Return what the buffers take in which gradients and parameters wait for the network."""
    elements = min(engine.bucket_elements, num_params)
    if engine.zero_stage == 0:
        return 0.0 if world_size == 1 else float(elements * engine.element_bytes)
    element = 4 if engine.precision == "bf16" and world_size > 1 else engine.element_bytes
    buffers = 2 * elements * element  # one fills while the other is on its way
    if engine.zero_stage == 3:
        buffers += elements * engine.element_bytes  # parameters gathered ahead
    return float(buffers)
