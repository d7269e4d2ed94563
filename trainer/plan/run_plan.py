"""What a run will need: memory, disk, time and money, from its sizes and a machine's facts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from trainer.plan.memory import MASTER_AND_MOMENTS, EnginePlan
from trainer.plan.occupancy import KEYS_AND_VALUES, gpu_memory, host_memory, host_peak
from trainer.plan.step_time import StepTime, step_time
from trainer.plan.work import GB, Cost, Machine, RunPlan, Work

LIFE_OVERHEAD_H = 0.1  # of a job: its start, and the time that the last save needs


def plan_run(
    work: Work, engine: EnginePlan, machine: Machine, efficiency: float | None = None
) -> RunPlan:
    """Plan a run.

    Args:
        work: what it does.
        engine: how its models are held.
        machine: where.
        efficiency: share of the peak that its GPUs reach; None = what is published of them.

    Raises:
        ConfigError: when the architecture lacks a size.
    """
    world = machine.num_gpus
    counts = {model.role: model.counts for model in work.models}
    trained = sum(c.trained for c in counts.values())
    memory = gpu_memory(work, engine, machine)
    host, nvme = host_memory(work, engine, machine)
    checkpoint = MASTER_AND_MOMENTS * trained
    time = step_time(work, engine, machine, efficiency)
    hours = _hours(work, time)
    draft = RunPlan(
        stage=work.stage,
        machine=machine.name,
        nodes=machine.nodes,
        gpus_per_node=machine.gpus_per_node,
        gpu=machine.gpu,
        precision=engine.precision,
        zero_stage=engine.zero_stage,
        offload_optimizer=engine.offload_optimizer,
        offload_params=engine.offload_params,
        activation_checkpointing=engine.activation_checkpointing,
        micro_batch_size=work.micro_batch_size,
        parameters={role: dict(c.by_kind) for role, c in counts.items()},
        trained_parameters=trained,
        memory=memory,
        peak_bytes=sum(memory.values()),
        gpu_bytes=None if machine.gpu_memory_gb is None else machine.gpu_memory_gb * GB,
        host=host,
        host_bytes=machine.host_bytes,
        nvme_bytes=nvme,
        checkpoint_bytes=checkpoint,
        disk_bytes=checkpoint * _num_checkpoints(work, checkpoint),
        quota_bytes=None if machine.quota_gb is None else machine.quota_gb * GB,
        network_bytes=time.network,
        flops_per_step=time.flops,
        step_seconds=time.seconds,
        step_parts=time.parts,
        tokens_per_step=work.tokens_per_step,
        num_steps=work.num_steps,
        hours=hours,
        limit_hours=machine.limit_hours,
        num_jobs=_num_jobs(hours, machine.limit_hours),
        gpu_hours=None if hours is None else hours * world,
        costs=_costs(hours, machine),
        remarks=tuple(time.remarks),
    )
    return dataclasses.replace(draft, problems=tuple(_problems(draft, work, machine)))


def _num_checkpoints(work: Work, checkpoint_bytes: int) -> int:
    kept = work.keep_last + 1  # the new one is written before an old one is deleted
    if work.keep_every and work.num_steps:
        kept += work.num_steps // work.keep_every
    if work.keep_gb is not None:  # which never deletes the newest before the next is there
        kept = min(kept, max(2, int(work.keep_gb * GB // max(1, checkpoint_bytes))))
    return kept


def _hours(work: Work, time: StepTime) -> float | None:
    if time.seconds is None or work.num_steps is None:
        return None
    return (time.once_seconds + time.seconds * work.num_steps) / 3600


def _num_jobs(hours: float | None, limit: float | None) -> int | None:
    if hours is None or limit is None or limit <= LIFE_OVERHEAD_H:
        return None
    return max(1, math.ceil(hours / (limit - LIFE_OVERHEAD_H)))


def _costs(hours: float | None, machine: Machine) -> tuple[Cost, ...]:
    if hours is None:
        return ()
    gpu_hours = hours * machine.num_gpus
    return tuple(
        Cost(p.who, p.currency, gpu_hours * p.per_gpu_hour, p.source, p.date)
        for p in machine.prices
    )


def _problems(plan: RunPlan, work: Work, machine: Machine) -> list[str]:
    """Return why the run cannot be as asked."""
    problems = []
    if plan.gpu_bytes is not None and plan.peak_bytes > plan.gpu_bytes:
        problems.append(
            f"needs {plan.peak_bytes / GB:.1f} GB on each {plan.gpu or 'GPU'} of "
            f"{plan.gpu_bytes / GB:g} GB; the largest parts are {_largest(plan.memory)}"
            f"{_smaller_cache(plan, work)}"
        )
    host = host_peak(plan.host)
    if plan.host_bytes is not None and host > plan.host_bytes:
        problems.append(
            f"needs {host / GB:.0f} GB of a node's memory, a job with {plan.gpus_per_node} GPUs "
            f"gets {plan.host_bytes / GB:.0f} GB; the largest parts are {_largest(plan.host)}"
        )
    if work.keep_gb is not None and work.keep_gb * GB < 2 * plan.checkpoint_bytes:
        problems.append(
            f"loop.keep_gb={work.keep_gb:g} cannot hold a checkpoint of "
            f"{plan.checkpoint_bytes / GB:.1f} GB beside the last one; use "
            f"{math.ceil(2.02 * plan.checkpoint_bytes / GB)}, or train fewer parameters (peft=lora)"
        )
    if plan.quota_bytes is not None and plan.disk_bytes > plan.quota_bytes:
        problems.append(_quota_problem(plan, work))
    if plan.num_jobs is not None and machine.max_lives and plan.num_jobs > machine.max_lives:
        problems.append(
            f"takes {plan.num_jobs} jobs of {plan.limit_hours:g} hours one after the other, but "
            f"cluster.max_lives={machine.max_lives}; raise it, or use more GPUs"
        )
    return problems


def _smaller_cache(plan: RunPlan, work: Work) -> str:
    """Return how few keys and values would do, where it is they that are too many."""
    size = plan.memory.get(KEYS_AND_VALUES)
    if size is None or work.rollout is None or plan.gpu_bytes is None:
        return ""
    room = plan.gpu_bytes - (plan.peak_bytes - size)
    tokens = int(work.rollout.cached_tokens * room / size)
    if tokens < work.rollout.row_tokens:
        return ""
    return f"; stage.sampling.cached_tokens={tokens // 256 * 256} fits beside the rest"


def _quota_problem(plan: RunPlan, work: Work) -> str:
    assert plan.quota_bytes is not None
    fitting = int(plan.quota_bytes // max(1, plan.checkpoint_bytes)) - 1
    remedy = f"loop.keep_last={fitting} fits" if fitting >= 1 and not work.keep_every else ""
    if not remedy:
        remedy = "train fewer parameters (peft=lora), or keep the run on a larger file system"
        if fitting >= 1:
            remedy = f"loop.keep_every=0 loop.keep_last={fitting} fits"
    num = _num_checkpoints(work, plan.checkpoint_bytes)
    return (
        f"checkpoints take {plan.disk_bytes / GB:.0f} GB ({num} of "
        f"{plan.checkpoint_bytes / GB:.1f} GB, one of them while it is written), more than "
        f"cluster.site.quota_gb={plan.quota_bytes / GB:g}; {remedy}. If your quota is larger, set "
        "cluster.site.quota_gb"
    )


def _largest(parts: Mapping[str, float]) -> str:
    found = sorted(parts.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{name} {size / GB:.1f} GB" for name, size in found)
