"""How long a step takes on a machine, by part, and what of it is assumed or unknown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from trainer.plan.activations import cache_bytes
from trainer.plan.flops import device_peak
from trainer.plan.memory import EnginePlan
from trainer.plan.speed import (
    ADAM_BYTES,
    ADAM_BYTES_PER_S_PER_CORE,
    ADAPTER_FACTOR,
    UNPACKING_FACTOR,
    compute_seconds,
    decoding_seconds,
    find_efficiency,
    host_bytes_per_s,
    network_bytes_per_s,
    pass_flops,
    step_traffic,
)
from trainer.plan.work import Machine, Rollout, Work


@dataclass(frozen=True)
class StepTime:
    seconds: float | None
    parts: Mapping[str, float | None]
    once_seconds: float
    flops: float
    network: float
    remarks: list[str] = field(default_factory=list)


def step_time(
    work: Work, engine: EnginePlan, machine: Machine, efficiency: float | None
) -> StepTime:
    """Return how long a step takes, by part."""
    remarks: list[str] = []
    again = engine.activation_checkpointing
    flops = sum(pass_flops(one, recomputes=again) for one in work.passes)
    once = sum(pass_flops(one, recomputes=False) for one in work.once)
    share = _efficiency(machine, efficiency, remarks)
    computing = compute_seconds(flops, machine.gpu, engine.precision, share, machine.num_gpus)
    before = compute_seconds(once, machine.gpu, engine.precision, share, machine.num_gpus)
    if computing is not None and any(m.tuning and m.tuning.adapts for m in work.models):
        computing *= ADAPTER_FACTOR
    if computing is not None and any(m.quantization for m in work.models):
        computing *= UNPACKING_FACTOR
    traffic = step_traffic(
        work.passes,
        engine,
        machine.num_gpus,
        trained=sum(m.counts.trained for m in work.models),
        micro_tokens=work.micro_batch_size * work.row_length,
        optimizer_steps=work.optimizer_steps,
    )
    parts: dict[str, float | None] = {"compute": computing}
    parts["network"] = _network_seconds(traffic.network, machine, remarks)
    if traffic.host:
        parts["offload"] = _offload_seconds(traffic.host, machine, remarks)
        parts["host's Adam"] = _adam_seconds(work, engine, machine, remarks)
    if work.rollout is not None:
        parts["rollout"] = _rollout_seconds(work.rollout, engine, machine)
    total = None if computing is None else sum(part or 0.0 for part in parts.values())
    return StepTime(total, parts, before or 0.0, flops, traffic.network, remarks)


def _efficiency(machine: Machine, asked: float | None, remarks: list[str]) -> float | None:
    if machine.gpu is None or device_peak(machine.gpu) is None:
        name = machine.gpu or "null"
        remarks.append(f"cluster.site.gpu={name} is not known: no time and no price")
        return None
    if asked is not None:
        remarks.append(f"efficiency {asked:.0%} of the peak, as given")
        return asked
    found = find_efficiency(machine.gpu)
    if found is None:
        remarks.append(
            f"no published efficiency of {machine.gpu}: no time and no price; give --efficiency"
        )
        return None
    remarks.append(f"efficiency {found.share:.0%} of the peak: {found.source}")
    return found.share


def _network_seconds(volume: float, machine: Machine, remarks: list[str]) -> float | None:
    if not volume:
        return 0.0
    rate = network_bytes_per_s(
        machine.intra_gb_per_s, machine.inter_gb_per_s, machine.nodes, machine.gpus_per_node
    )
    if rate is None:
        remarks.append(
            "bandwidths between GPUs are unknown (cluster.site.intra_node_gb_per_s, "
            "inter_node_gb_per_s): communication is not in the time"
        )
        return None
    return volume / rate


def _offload_seconds(volume: float, machine: Machine, remarks: list[str]) -> float | None:
    rate = host_bytes_per_s(machine.gpu) if machine.gpu else None
    if rate is None:
        remarks.append("the rate between GPU and host is unknown: offload is not in the time")
    return None if rate is None else volume / rate


def _adam_seconds(
    work: Work, engine: EnginePlan, machine: Machine, remarks: list[str]
) -> float | None:
    """Return how long the host's cores update their share of the weights, in a step."""
    if engine.offload_optimizer == "none":
        return 0.0
    if engine.offload_optimizer == "nvme":
        remarks.append("the disk's rate is unknown: reading and writing it is not in the time")
    if machine.cpus_per_gpu is None:
        remarks.append("cores a GPU are unknown: Adam on the host is not in the time")
        return None
    share = sum(model.counts.trained for model in work.models) / machine.num_gpus
    rate = machine.cpus_per_gpu * ADAM_BYTES_PER_S_PER_CORE
    return work.optimizer_steps * share * ADAM_BYTES / rate


def _rollout_seconds(rollout: Rollout, engine: EnginePlan, machine: Machine) -> float | None:
    row, rows = rollout.row_tokens, rollout.rows_together(machine.num_gpus)
    cache = cache_bytes(rollout.policy.shape, rows * row, row, engine.element_bytes)
    batch = decoding_seconds(rollout.policy, engine, machine.gpu, rollout.max_new_tokens, cache)
    num_batches = math.ceil(-(-rollout.num_samples // machine.num_gpus) / rows)
    return None if batch is None else batch * num_batches
