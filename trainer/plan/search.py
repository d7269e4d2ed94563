"""Ways to run the same work that fit a machine, the cheapest first, and why others do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

from trainer.plan.memory import EnginePlan, Place
from trainer.plan.occupancy import host_peak
from trainer.plan.run_plan import plan_run
from trainer.plan.work import Machine, RunPlan, Work

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
MAX_NODES = 32  # tried where the partition has no limit
Divides = Callable[[int, int], bool]


@dataclass(frozen=True)
class Refusal:
    """Ways that differ only in size and all do not fit.

    Attributes:
        engine: ZeRO stage, offload, recomputation.
        nodes: the most that were tried.
        reason: of the one that came nearest.
    """

    engine: EnginePlan
    nodes: int
    reason: str


@dataclass(frozen=True)
class Search:
    """What was found.

    Attributes:
        fitting: the cheapest first; of ways that differ in micro-batches only the fastest.
        refused: those that never fit.
        num_tried: plans made.
    """

    fitting: list[RunPlan]
    refused: list[Refusal]
    num_tried: int


def search(
    work: Work,
    engine: EnginePlan,
    machine: Machine,
    divides: Divides,
    efficiency: float | None = None,
    *,
    with_nvme: bool = False,
) -> Search:
    """Try ZeRO stages, offload, recomputation, node counts and micro-batches.

    Args:
        work: what is to be done.
        engine: its precision is kept.
        machine: its GPUs a node are kept, its nodes are not.
        divides: (micro-batch size, ranks) -> whether the global batch divides over them.
        efficiency: as for ``plan_run``.
        with_nvme: whether a node-local disk is known that offload may use.
    """
    fitting: list[RunPlan] = []
    refused: list[Refusal] = []
    tried = 0
    # Checkpoints take the same in all of them: whoever asks says once that they are too large.
    machine = dataclasses.replace(machine, quota_gb=None)
    for candidate in _engines(engine, with_nvme):
        misfits: list[RunPlan] = []
        before = len(fitting)
        for site in _sites(machine):
            if (
                site.num_gpus == 1
                and candidate.zero_stage
                and candidate.offload_optimizer == "none"
            ):
                continue  # nothing to split
            plans = list(_plans(work, candidate, site, divides, efficiency))
            tried += len(plans)
            good = [plan for plan in plans if not plan.problems]
            misfits += [plan for plan in plans if plan.problems]
            fitting += [min(good, key=rank)] if good else []
        if len(fitting) == before and misfits:
            nearest = min(misfits, key=_shortfall)
            refused.append(
                Refusal(candidate, nearest.nodes, nearest.problems[0].partition("; ")[0])
            )
    return Search(sorted(fitting, key=rank), refused, tried)


def rank(plan: RunPlan) -> tuple[float, ...]:
    """Return what orders plans: GPU-hours, which are the price, then hours, then memory left."""
    seconds = plan.step_seconds
    if seconds is None:  # of an unknown device: fewest GPUs, least work, least traffic
        num_moved = (plan.offload_optimizer != "none") + (plan.offload_params != "none")
        return plan.num_gpus, num_moved, plan.flops_per_step, plan.network_bytes, plan.peak_bytes
    # The order must not change with the number of steps, which may be unknown.
    return round(seconds * plan.num_gpus, 6), seconds, plan.peak_bytes


def _engines(engine: EnginePlan, with_nvme: bool) -> Iterator[EnginePlan]:
    places: list[Place] = ["none", "cpu", "nvme"] if with_nvme else ["none", "cpu"]
    for stage, optimizer, params, again in product(range(4), places, places, (False, True)):
        if (optimizer != "none" and stage == 0) or (params != "none" and stage < 3):
            continue
        if (optimizer == "nvme" and stage < 3) or (params != "none" and params != optimizer):
            continue
        yield dataclasses.replace(
            engine,
            zero_stage=stage,
            offload_optimizer=optimizer,
            offload_params=params,
            activation_checkpointing=again,
        )


def _sites(machine: Machine) -> Iterator[Machine]:
    """Yield the machine with parts of a node, and with more and more nodes."""
    whole = machine.whole_node_gpus or machine.gpus_per_node
    most = machine.max_gpus or MAX_NODES * whole
    parts = [number for number in (1, 2, 4, 8, 16) if number < whole]
    counts = [(1, number) for number in parts]
    counts += [(nodes, whole) for nodes in range(1, MAX_NODES + 1)]
    for nodes, gpus in counts:
        if machine.min_gpus <= nodes * gpus <= most:
            yield dataclasses.replace(machine, nodes=nodes, gpus_per_node=gpus)


def _plans(
    work: Work, engine: EnginePlan, machine: Machine, divides: Divides, efficiency: float | None
) -> Iterator[RunPlan]:
    """Yield plans with larger and larger micro-batches, up to the first that does not fit."""
    for size in MICRO_BATCH_SIZES:
        if not divides(size, machine.num_gpus):
            continue
        sized = dataclasses.replace(work, micro_batch_size=size)
        plan = plan_run(sized, engine, machine, efficiency)
        yield plan
        if plan.problems:
            return


def _shortfall(plan: RunPlan) -> float:
    """Return how far a plan is from fitting, as a share of what there is."""
    limits = (
        (plan.peak_bytes, plan.gpu_bytes),
        (host_peak(plan.host), plan.host_bytes),
    )
    return max((need / have for need, have in limits if have), default=0.0)


def changes_of(plan: RunPlan) -> dict[str, str]:
    """Return the keys and values of a configuration that make a run as planned."""
    return {
        "engine.zero_stage": str(plan.zero_stage),
        "engine.offload_optimizer": plan.offload_optimizer,
        "engine.offload_params": plan.offload_params,
        "engine.activation_checkpointing": str(plan.activation_checkpointing).lower(),
        "loop.micro_batch_size": str(plan.micro_batch_size),
        "cluster.nodes": str(plan.nodes),
        "cluster.gpus_per_node": str(plan.gpus_per_node),
    }
