"""One line of the table: a run or a step of a pipeline, with everything that is shown of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launch.monitor.queue import Job
from launch.monitor.ranks import rank_lines
from launch.monitor.state import State, judge, newest_job
from trainer.metrics.account import planned_gpu_hours, wandb_lines
from trainer.metrics.run_facts import RunFacts, figure
from trainer.plan.work import Cost
from trainer.stages import SINGLE_PROCESS

# What tells best how a stage does, where its records have it.
FIGURES = ("loss", "accuracy", "reward", "kl", "num_skips")


@dataclass(frozen=True)
class Row:
    """What is shown of one run; None is unknown, times are in seconds."""

    name: str
    folder: Path
    stage: str = ""
    state: str = "new"
    note: str = ""
    job: str | None = None
    nodes: str = ""
    step: int | None = None
    max_steps: int | None = None
    eta_s: float | None = None  # to the end of the run, at the speed of the last steps
    limit_s: float | None = None  # to the end of the job's time
    starts_s: float | None = None  # to the expected start of a waiting job
    figures: dict[str, float] = field(default_factory=dict)
    tokens_per_s: float | None = None
    gpu_hours: float | None = None  # one rank is one GPU; ``hours_unit`` says if it is none
    hours_unit: str = "GPU-h"
    is_lower_bound: bool = False  # the end of a life is unknown, so there was more
    planned_gpu_hours: float | None = None
    costs: list[Cost] = field(default_factory=list)
    saved_step: int | None = None
    saved_age_s: float | None = None
    num_lives: int = 0
    ends: list[str] = field(default_factory=list)  # why each life before this one ended
    ranks: list[str] = field(default_factory=list)  # which are slow, silent or stand still
    problems: list[str] = field(default_factory=list)
    parents: list[str] = field(default_factory=list)
    wandb: list[str] = field(default_factory=list)  # lines to type

    @property
    def needs_another_job(self) -> bool:
        """Return whether the job's time ends before the run does."""
        return self.eta_s is not None and self.limit_s is not None and self.eta_s > self.limit_s

    @property
    def share(self) -> float | None:
        """Return the share of the steps that is done."""
        if not self.max_steps:
            return None
        return min(1.0, (self.step or 0) / self.max_steps)


def build_row(facts: RunFacts, jobs: Mapping[str, Job] | None, name: str = "") -> Row:
    """Return what is shown of a run.

    Args:
        facts: what its files say.
        jobs: what Slurm says, None when it was not asked.
        name: instead of the run's own, such as that of a pipeline's step.
    """
    state, job = judge(facts, jobs), newest_job(facts, jobs)
    hours, is_whole = facts.rank_hours(state.is_alive)
    costs = facts.costs(hours) if facts.lives else []
    # The last life still lives, or its end is the state's note; unless the next one is starting.
    is_starting = state.is_alive and bool(facts.lives) and facts.lives[-1].has_ended
    earlier = facts.lives if is_starting else facts.lives[:-1]
    return Row(
        name=name or facts.run_dir.name,
        folder=facts.run_dir,
        stage=facts.stage,
        state=state.word,
        note=state.note,
        job=_job_number(facts, job, state),
        nodes=_places(facts, job, state),
        step=facts.step,
        max_steps=None if facts.stage in SINGLE_PROCESS else facts.max_steps,
        eta_s=facts.time_left_s(state.is_alive),
        limit_s=max(0.0, job.ends - facts.now) if job and job.is_active and job.ends else None,
        starts_s=max(0.0, job.starts - facts.now)
        if job and job.is_pending and job.starts
        else None,
        figures=read_figures(facts),
        tokens_per_s=figure(facts.train, "tokens_per_s"),
        gpu_hours=hours if facts.lives else None,
        hours_unit=facts.hours_unit,
        is_lower_bound=not is_whole,
        planned_gpu_hours=planned_gpu_hours(facts),
        costs=costs,
        saved_step=facts.saved.step if facts.saved else None,
        saved_age_s=facts.seconds_since(facts.saved.time) if facts.saved else None,
        num_lives=len(facts.lives),
        ends=[life.why or "no end recorded" for life in earlier],
        ranks=rank_lines(facts) if state.is_alive else [],
        problems=facts.problems,
        wandb=wandb_lines(facts.run_dir),
    )


def read_figures(facts: RunFacts) -> dict[str, float]:
    """Return the figures of the last training record that say how the run does."""
    values = {key: figure(facts.train, key) for key in FIGURES}
    # A NaN is shown as one: the run will stop, or has.
    return {
        key: float("nan") if value is None else value
        for key, value in values.items()
        if key in facts.train
    }


def _job_number(facts: RunFacts, job: Job | None, state: State) -> str | None:
    if job is not None:
        return job.number
    if state.word == "submitted" and facts.job_ids:
        return facts.job_ids[-1]
    return facts.lives[-1].job if facts.lives else None


def _places(facts: RunFacts, job: Job | None, state: State) -> str:
    """Return where the run is, or was at last."""
    if job is not None and job.nodes:
        return job.nodes
    if not facts.lives or state.word in ("pending", "requeued"):
        return ""
    life = facts.lives[-1]
    more = f" ({life.world_size} ranks)" if (life.world_size or 1) > 1 else ""
    return life.host + more
