"""``kuroshio plan``: what a run will need, before it is asked for."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence

from rich.console import Console

from launch.plan_inputs import read_engine, read_machine, read_work
from launch.plan_page import show_plan
from trainer.config import RunConfig
from trainer.errors import ConfigError
from trainer.plan.run_plan import plan_run
from trainer.plan.work import RunPlan


def main(arguments: Sequence[str]) -> int:
    """Plan the run that overrides describe; return the exit code (78: it cannot be)."""
    options = _parse(arguments)
    from launch.compose import compose_config

    config = compose_config(options.overrides)
    plan = plan_config(config, options.efficiency)
    console = Console(width=100, highlight=False, markup=False)
    if plan is None:
        console.print(f"stage={config.stage['name']} is one process without a GPU: nothing to plan")
        return 0
    if options.json:
        print(json.dumps(plan.as_dict(), ensure_ascii=False, indent=1))
    else:
        show_plan(plan, console)
    return ConfigError.exit_code if plan.problems else 0


def plan_config(config: RunConfig, efficiency: float | None = None) -> RunPlan | None:
    """Plan a run.

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
    return dataclasses.replace(plan, remarks=(*remarks, *plan.remarks))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kuroshio plan",
        description="Say what a run needs: memory, disk, hours, jobs and money. No GPU, no torch.",
    )
    parser.add_argument("overrides", nargs="*", metavar="GROUP=OPTION | KEY=VALUE")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "--efficiency",
        type=float,
        metavar="SHARE",
        help="share of the GPUs' peak that training reaches, such as 0.4, where you measured it",
    )
    options = parser.parse_args(arguments)
    if options.efficiency is not None and not 0 < options.efficiency <= 1:
        raise ConfigError(f"--efficiency={options.efficiency:g}: expected more than 0, at most 1")
    return options
