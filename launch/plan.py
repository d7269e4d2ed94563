"""``kuroshio plan``: what a run will need, before it is asked for."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence

from rich.console import Console

from launch import plan_pipeline
from launch.compose import compose_config
from launch.graph.definition import is_pipeline
from launch.plan_inputs import read_work
from launch.plan_page import show_plan, show_remarks, show_search
from launch.planning import plan_config, search_config
from trainer.config import RunConfig
from trainer.errors import ConfigError
from trainer.plan.search import changes_of
from trainer.plan.work import RunPlan

NO_GPU = "is one process without a GPU: there is nothing to plan"


def main(arguments: Sequence[str]) -> int:
    """Plan the run that overrides describe; return the exit code (78: it cannot be)."""
    options = _parse(arguments)
    console = Console(width=112, highlight=False, markup=False)
    if is_pipeline(options.overrides):
        if options.fit:
            raise ConfigError("--fit searches for one run; name a step's own overrides with it")
        words = options.overrides
        return plan_pipeline.main(words, options.json, options.efficiency, console)
    config = compose_config(options.overrides)
    plan = plan_config(config, options.efficiency)
    if plan is None:
        console.print(f"stage={config.stage['name']} {NO_GPU}")
        return 0
    if options.fit:
        return _fit(config, plan, options, console)
    if options.json:
        print(json.dumps(plan.as_dict(), ensure_ascii=False, indent=1))
    else:
        show_plan(plan, console)
    return ConfigError.exit_code if plan.problems else 0


def _fit(config: RunConfig, plan: RunPlan, options: argparse.Namespace, console: Console) -> int:
    """Show the ways to run a config that fit."""
    work = read_work(config)
    assert work is not None  # it has a plan
    found = search_config(config, work, options.efficiency)
    quota = [problem for problem in plan.problems if "quota_gb" in problem]
    if options.json:
        plans = [each.as_dict() | {"problems": quota} for each in found.fitting]
        print(json.dumps(plans, ensure_ascii=False, indent=1))
        return ConfigError.exit_code if quota or not found.fitting else 0
    show_search(found, console, options.rows)
    if found.fitting:
        decided = changes_of(found.fitting[0])
        kept = [w for w in options.overrides if w.partition("=")[0].lstrip("+") not in decided]
        words = [*kept, *(f"{key}={value}" for key, value in decided.items())]
        console.print(f"\nthe first row:\n  kuroshio submit {shlex.join(words)}", soft_wrap=True)
    show_remarks([*plan.remarks, *(found.fitting[0].remarks if found.fitting else ())], console)
    for problem in quota:
        console.print(f"does not fit: {problem}", soft_wrap=True)
    return ConfigError.exit_code if quota or not found.fitting else 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kuroshio plan",
        description="Say what a run needs: memory, disk, hours, jobs and money. No GPU, no torch.",
    )
    parser.add_argument("overrides", nargs="*", metavar="GROUP=OPTION | KEY=VALUE")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "--fit",
        action="store_true",
        help="search ZeRO stage, offload, recomputation, micro-batch and nodes; cheapest first",
    )
    parser.add_argument(
        "--rows", type=int, default=12, metavar="N", help="of the tables of --fit, at most"
    )
    parser.add_argument(
        "--efficiency",
        type=float,
        metavar="SHARE",
        help="share of the GPUs' peak that training reaches, such as 0.4, where you measured it",
    )
    options = parser.parse_intermixed_args(arguments)
    if options.efficiency is not None and not 0 < options.efficiency <= 1:
        raise ConfigError(f"--efficiency={options.efficiency:g}: expected more than 0, at most 1")
    return options
