"""What a run does, where, and the plan that comes of it: plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.plan.memory import Model
from trainer.plan.speed import Pass

GB = 1e9


@dataclass(frozen=True)
class Price:
    """What a GPU costs one kind of project."""

    who: str
    currency: str
    per_gpu_hour: float
    source: str = ""
    date: str | None = None


@dataclass(frozen=True)
class Machine:
    """Facts of a machine and what is asked of it; None is unknown.

    Attributes:
        limit_hours: of a job.
        min_gpus, max_gpus: of a job in the partition.
        max_lives: jobs one after the other.
    """

    name: str
    nodes: int
    gpus_per_node: int
    gpu: str | None = None
    gpu_memory_gb: float | None = None
    memory_gb_per_gpu: float | None = None
    cpus_per_gpu: int | None = None
    whole_node_gpus: int | None = None
    intra_gb_per_s: float | None = None
    inter_gb_per_s: float | None = None
    quota_gb: float | None = None
    limit_hours: float | None = None
    min_gpus: int = 1
    max_gpus: int | None = None
    max_lives: int | None = None
    prices: tuple[Price, ...] = ()

    @property
    def num_gpus(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.gpus_per_node

    @property
    def host_bytes(self) -> float | None:
        """Memory that a job may have on a node, with this many of its GPUs."""
        if self.memory_gb_per_gpu is None:
            return None
        return self.memory_gb_per_gpu * self.gpus_per_node * GB


@dataclass(frozen=True)
class Rollout:
    """Responses that PPO's policy writes in a step: samples over all ranks and their lengths."""

    policy: Model
    num_samples: int
    max_prompt: int
    max_new_tokens: int
    cached_tokens: int

    @property
    def row_tokens(self) -> int:
        """Longest prompt and response together."""
        return self.max_prompt + self.max_new_tokens

    def rows_together(self, world_size: int) -> int:
        """Return how many responses a rank writes at once."""
        own = -(-self.num_samples // world_size)
        return max(1, min(own, self.cached_tokens // self.row_tokens))


@dataclass(frozen=True)
class Work:
    """What a run does, without regard to where.

    Attributes:
        stage: its name.
        models: in the engine.
        passes: of a step.
        once: passes before the first step (a cached reference).
        row_length: tokens of a row.
        micro_batch_size: rows a rank holds at once.
        optimizer_steps: of a step of the loop.
        is_packed: whether a row holds several documents.
        wants_logps: whether the policy's loss is of log-probabilities.
        rollout: of PPO.
        num_steps: None where only the prepared data can tell.
        keep_last, keep_every, keep_gb: checkpoints.
    """

    stage: str
    models: tuple[Model, ...]
    passes: tuple[Pass, ...]
    row_length: int
    micro_batch_size: int
    optimizer_steps: int = 1
    once: tuple[Pass, ...] = ()
    is_packed: bool = True
    wants_logps: bool = False
    rollout: Rollout | None = None
    num_steps: int | None = None
    tokens_per_step: int = 0
    keep_last: int = 2
    keep_every: int = 0
    keep_gb: float | None = None


@dataclass(frozen=True)
class Cost:
    """What a run costs one kind of project: the whole one, or what it has spent so far."""

    who: str
    currency: str
    amount: float
    source: str
    date: str | None


@dataclass(frozen=True)
class RunPlan:
    """The answer: everything in bytes, seconds and hours; None is unknown.

    Attributes:
        parameters: by model and kind.
        memory: bytes on each GPU by part, at the moment when there are most.
        peak_bytes: their sum.
        gpu_bytes: that a GPU has.
        host: bytes of one node's memory by part.
        host_bytes: that a job may have on a node.
        nvme_bytes: on a node's own disk.
        checkpoint_bytes: one checkpoint.
        disk_bytes: all checkpoints kept, and the one being written.
        network_bytes: that a GPU sends in a step.
        problems: why the run cannot be as asked, each with a remedy.
        remarks: what is unknown or assumed.
    """

    stage: str
    machine: str
    nodes: int
    gpus_per_node: int
    gpu: str | None
    precision: str
    zero_stage: int
    offload_optimizer: str
    offload_params: str
    activation_checkpointing: bool
    micro_batch_size: int
    parameters: Mapping[str, Mapping[str, int]]
    trained_parameters: int
    memory: Mapping[str, float]
    peak_bytes: float
    gpu_bytes: float | None
    host: Mapping[str, float]
    host_bytes: float | None
    nvme_bytes: float
    checkpoint_bytes: int
    disk_bytes: int
    quota_bytes: float | None
    network_bytes: float
    flops_per_step: float
    step_seconds: float | None
    step_parts: Mapping[str, float | None]
    tokens_per_step: int
    num_steps: int | None
    hours: float | None
    limit_hours: float | None
    num_jobs: int | None
    gpu_hours: float | None
    costs: tuple[Cost, ...] = ()
    problems: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def num_gpus(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.gpus_per_node

    @property
    def tokens_per_s(self) -> float | None:
        """Return the tokens of all GPUs in a second."""
        return self.tokens_per_step / self.step_seconds if self.step_seconds else None

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data for JSON."""
        plain = dataclasses.asdict(self)
        return {**plain, "num_gpus": self.num_gpus, "tokens_per_s": self.tokens_per_s}
