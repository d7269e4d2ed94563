"""``kuroshio submit``: from a login node to a job in the queue, without torch."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import run_folder, submission
from launch.secrets import flatten, refuse_secrets
from launch.slurm import render
from launch.submission import Draft
from trainer.errors import ConfigError


def main(arguments: Sequence[str]) -> int:
    """Check a run, write its folder and submit its job; return the exit code."""
    options = _parse(arguments)
    values = _read_values(options)
    if options.inside_job:
        print(submission.enter_job(values))
        return 0
    checked = submission.draft(
        values, Path(str(values["run_dir"])), options.after, must_fit=not options.force
    )
    if options.dry_run:
        print(render(checked.job), end="")
        _say(_describe(checked))
        return 0
    number, start = submission.submit_draft(checked)
    _say([*_describe(checked), *_follow(checked, number, start)])
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kuroshio submit",
        allow_abbrev=False,
        description="Submit a run as a job of cluster=NAME. It resumes itself until it is done.",
        epilog="With pipeline=NAME the steps of a pipeline become jobs that wait for each other, "
        "with --multirun KEY=A,B one array of runs, --at-once N of them at a time.",
    )
    parser.add_argument("overrides", nargs="*", metavar="GROUP=OPTION | KEY=VALUE")
    parser.add_argument("--config", metavar="FILE", help="a whole configuration: RUN/config.yaml")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the job script, or the jobs; write nothing"
    )
    parser.add_argument(
        "--after",
        action="append",
        default=[],
        metavar="JOB",
        help="start once this job has ended well; may be given several times",
    )
    parser.add_argument(
        "--force", action="store_true", help="submit although the plan says that it does not fit"
    )
    # What slurm/train.sbatch calls inside the job that somebody submitted by hand.
    parser.add_argument("--inside-job", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    if options.config and options.overrides:
        raise ConfigError(
            f"--config={options.config} is a whole configuration, so "
            f"{' '.join(options.overrides)} has no place beside it; leave one of them out"
        )
    return options


def _read_values(options: argparse.Namespace) -> dict[str, Any]:
    if options.config is None:
        from launch.compose import compose_values

        return compose_values(options.overrides)
    path = Path(options.config)
    values = run_folder.read(path)
    refuse_secrets(flatten(values))
    if path.name == run_folder.CONFIG_FILE:
        values["run_dir"] = str(path.parent)  # the folder may have been moved
    return values


def _describe(checked: Draft) -> list[str]:
    job, cluster = checked.job, checked.config.cluster
    what = "process" if cluster.site.gpus_per_node == 0 else "GPU"
    ranks = f"{job.nodes} x {job.tasks_per_node} {what}{'s' if job.tasks_per_node > 1 else ''}"
    place = f"partition {job.partition}" if job.partition else "the default partition"
    limit = job.time or "the partition's limit"
    lines = [
        f"run       {checked.config.name}",
        f"machines  {ranks} of {cluster.site.name}, {place}",
        f"lives     at most {cluster.max_lives}, {limit} until each requeue",
        f"folder    {job.folder}",
    ]
    return lines + _planned(checked)


def _planned(checked: Draft) -> list[str]:
    plan = checked.plan
    if plan is None:
        return []
    lines = []
    if plan.hours is not None:
        jobs = f" = {plan.num_jobs} lives" if (plan.num_jobs or 1) > 1 else ""
        lines.append(f"plan      {plan.hours:,.1f} hours{jobs}, {plan.gpu_hours:,.0f} GPU-hours")
    for cost in plan.costs:
        lines.append(f"price     {cost.currency} {cost.amount:,.0f} ({cost.who}; {cost.source})")
    return lines + [f"remark    {remark}" for remark in plan.remarks]


def _follow(checked: Draft, number: str, start: str | None) -> list[str]:
    folder = shlex.quote(os.path.relpath(checked.job.folder))
    waits = ", ".join(checked.job.parents)
    when = f"after {waits}" if waits else (start or "").replace("T", " ") or "not known yet"
    return [
        f"start     {when}{'' if waits or not start else ' (estimate of Slurm)'}",
        f"job       {number}",
        f"follow    kuroshio watch {folder}",
    ]


def _say(lines: Sequence[str]) -> None:
    for line in lines:
        print(re.sub(r"[\x00-\x1f\x7f]", "?", line))
