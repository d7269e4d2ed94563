"""The plan of a run's configuration, and the ways to run it that fit its machine."""

from __future__ import annotations

import dataclasses
from functools import partial

from launch.plan_inputs import divides, read_engine, read_machine, read_work
from trainer.config import RunConfig
from trainer.plan.run_plan import plan_run
from trainer.plan.search import Search, changes_of, search
from trainer.plan.work import RunPlan, Work


def plan_config(config: RunConfig, efficiency: float | None = None) -> RunPlan | None:
    """Plan a run; where it does not fit, say what would.

    Args:
        config: of the run.
        efficiency: share of their peak that the GPUs reach; None = what is published of them.

    Returns:
        The plan; None for a stage that uses no GPU.

    Raises:
        ConfigError: the model's sizes cannot be read.
    """
    work = read_work(config)
    if work is None:
        return None
    engine, remarks = read_engine(config)
    plan = plan_run(work, engine, read_machine(config), efficiency)
    if work.num_steps is None:
        remarks.append(
            "loop.max_steps=0: the number of steps comes with the prepared data; "
            "loop.max_steps=N plans N steps"
        )
    if work.rollout is not None:
        remarks.append("prompts and responses are planned at their longest: an upper bound")
    problems = plan.problems
    if problems:
        problems = (*problems, *_what_fits(config, work, plan, efficiency))
    return dataclasses.replace(plan, problems=problems, remarks=(*remarks, *plan.remarks))


def search_config(config: RunConfig, work: Work, efficiency: float | None) -> Search:
    """Return the ways to run a config that fit its machine."""
    return search(
        work,
        read_engine(config)[0],
        read_machine(config),
        partial(divides, config),
        efficiency,
        with_nvme=config.engine.nvme_path is not None,
    )


def _what_fits(config: RunConfig, work: Work, plan: RunPlan, efficiency: float | None) -> list[str]:
    """Return the cheapest way that fits, if it is the machine's memory that is too small."""
    if all("checkpoints" in problem for problem in plan.problems):
        return []
    fitting = search_config(config, work, efficiency).fitting
    if not fitting:
        return ["nothing fits this machine: `kuroshio plan --fit` says why"]
    words = " ".join(f"{key}={value}" for key, value in changes_of(fitting[0]).items())
    return [f"the cheapest way that fits: {words}; `kuroshio plan --fit` lists others"]
