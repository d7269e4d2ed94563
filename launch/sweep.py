"""``--multirun``: runs that differ in a few values, one after another or as one array of jobs."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch import run_folder
from launch.compose import compose_values, expand_sweep
from launch.file_modes import private_files, wants_sharing
from launch.graph.lineage import changed_values
from launch.job_folder import read_submission, refuse_in_use
from launch.monitor.sources import is_run
from trainer.config import ClusterConfig, load_config
from trainer.config.cluster import partition_limits
from trainer.errors import EXIT_RESUME, ConfigError, KuroshioError
from trainer.metrics.run_facts import RunFacts, read_run

LONGEST_NAME = 80


@dataclass(frozen=True)
class Task:
    """One run of a sweep."""

    chosen: dict[str, str]  # swept key -> value
    values: dict[str, Any]  # the composed configuration
    folder: Path


def main(verb: str, arguments: Sequence[str]) -> int:
    """Run or submit every combination of the values given; return the exit code.

    Args:
        verb: ``run`` (here, in order) or ``submit`` (an array of jobs).
        arguments: ``--multirun``, ``KEY=A,B`` and the other words of a run.

    Raises:
        ConfigError: what is wrong with any of the runs, before the first of them.
    """
    options = _parse(verb, arguments)
    tasks = build_tasks(options.overrides)
    if verb == "run":
        return _run_here(tasks)
    return _submit(tasks, options.at_once, options.force)


def build_tasks(words: Sequence[str]) -> list[Task]:
    """Compose every combination of the swept values.

    Raises:
        ConfigError: nothing is swept, or with the problems of every run.
    """
    shared, swept = expand_sweep(words)
    if not swept:
        raise ConfigError("--multirun: no key has several values; write KEY=A,B")
    composed, problems = [], []
    for combination in itertools.product(*swept):
        try:
            values = compose_values([*shared, *combination])
            load_config(values)
            composed.append((combination, values))
        except ConfigError as error:
            problems += [f"{' '.join(combination)}: {line}" for line in str(error).splitlines()]
    if problems:
        raise ConfigError("\n".join(problems))
    return [_task(combination, values) for combination, values in composed]


def task_name(chosen: dict[str, str]) -> str:
    """Return a folder's name that says what a run of a sweep has of its own.

    A key is cut to its last part where that names it alone; characters that have no place in job
    scripts are replaced, and a hash keeps such names apart.
    """
    leaves = [key.rpartition(".")[2] for key in chosen]
    keys = [
        leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(chosen, leaves, strict=True)
    ]
    whole = "+".join(f"{key}={value}" for key, value in zip(keys, chosen.values(), strict=True))
    plain = re.sub(r"[^A-Za-z0-9_.+=-]+", "_", whole)[:LONGEST_NAME]
    digest = hashlib.sha256(whole.encode()).hexdigest()[:6]
    return plain if plain == whole else f"{plain}-{digest}"


def result_table(tasks: Sequence[Task]) -> Table:
    """Return what every run has come to: its values, its step, its last figures."""
    facts = [read_run(task.folder) for task in tasks]
    figures = [dict(_figures(each)) for each in facts]
    names = dict.fromkeys(name for row in figures for name in row)
    table = Table(box=None)
    for column in (*tasks[0].chosen, "step", *names):
        table.add_column(column, justify="right", no_wrap=True)
    for task, each, row in zip(tasks, facts, figures, strict=True):
        step = f"{each.step or 0}/{each.max_steps or '?'}"
        shown = [row.get(name, "") for name in names]
        table.add_row(*task.chosen.values(), step, *shown)
    return table


def _parse(verb: str, arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"kuroshio {verb} --multirun",
        allow_abbrev=False,
        description="One run for every combination of values: KEY=A,B KEY2=C,D make four.",
    )
    parser.add_argument("overrides", nargs="*", metavar="GROUP=OPTION | KEY=VALUE | KEY=A,B")
    parser.add_argument("--multirun", action="store_true", help="several runs")
    if verb == "submit":
        parser.add_argument(
            "--at-once",
            type=int,
            metavar="N",
            help="runs at the same time, at most; default: as many as the partition lets a user",
        )
        parser.add_argument("--force", action="store_true", help="although a plan does not fit")
    return parser.parse_intermixed_args(arguments)


def _task(combination: Sequence[str], values: dict[str, Any]) -> Task:
    chosen = dict(word.partition("=")[::2] for word in combination)
    chosen = {key.lstrip("+~"): value for key, value in chosen.items()}
    name = task_name(chosen)
    folder = Path(str(values["run_dir"])) / name
    values |= {"run_dir": str(folder), "name": f"{values['name']}+{name}"}
    return Task(chosen, values, folder)


def _run_here(tasks: Sequence[Task]) -> int:
    """Run the tasks in order; a failed one does not keep the others, a signal does."""
    from launch import run
    from launch.validation import build_run

    run.name_accelerator()
    for task in tasks:
        build_run(task.values)
    codes = []
    for number, task in enumerate(tasks, 1):
        print(f"\n{number} of {len(tasks)}: {task.folder}", flush=True)
        codes.append(_start(task))
        if EXIT_RESUME in codes:
            break
    begun = [task for task in tasks if is_run(task.folder)]
    if begun:
        _print(result_table(begun))
    return next((code for code in codes if code), 0)


def _start(task: Task) -> int:
    from launch import run

    try:
        with private_files(wants_sharing(task.values)):
            return run.start_ranks(task.values)
    except KuroshioError as error:
        print(f"kuroshio: {task.folder}: {error}", file=sys.stderr)
        return error.exit_code


def _submit(tasks: Sequence[Task], at_once: int | None, force: bool) -> int:
    """Submit the runs that wait for nobody as one array, and show what the others came to."""
    from launch.submission import draft, submit_array

    if at_once is not None and at_once < 1:
        raise ConfigError(f"--at-once={at_once}: expected 1 or more")
    left = [task for task in tasks if not _is_finished(task)]
    if len(left) < len(tasks):
        _print(result_table([task for task in tasks if task not in left]))
    left = [task for task in left if not _has_job(task)]
    if not left:
        return 0
    drafts, problems = [], []
    for task in left:
        try:
            drafts.append(draft(task.values, task.folder, must_fit=not force))
        except ConfigError as error:
            problems += [f"{task.folder.name}: {line}" for line in str(error).splitlines()]
    if problems:
        raise ConfigError("\n".join(problems))
    limit = at_once or default_limit(drafts[0].config.cluster, len(left))
    folder = tasks[0].folder.parent
    number = submit_array(drafts, folder, limit)
    for index, task in enumerate(left):
        print(f"job {number}_{index}  {task.folder}")
    print(
        f"\nat most {limit} at once (scontrol update arraytaskthrottle=N jobid={number} changes it)"
        f"\nfollow    kuroshio watch {folder}"
        "\nresults   the same command, when they have ended"
    )
    return 0


def default_limit(cluster: ClusterConfig, num_tasks: int) -> int:
    """Return how many runs a user may have at once in a job's partition, as its profile says."""
    limits = partition_limits(cluster)
    allowed = [num_tasks]
    if limits.max_jobs:
        allowed.append(limits.max_jobs)
    if limits.max_gpus:
        allowed.append(limits.max_gpus // (cluster.nodes * cluster.gpus_per_node))
    return max(1, min(allowed))


def _is_finished(task: Task) -> bool:
    """Say whether a submitted run has ended with the very values asked for now."""
    asked = read_submission(task.folder).get("asked")
    if asked is None or changed_values(asked, run_folder.plain(load_config(task.values))):
        return False  # a folder of another run is refused where its job is made
    return read_run(task.folder).is_finished


def _has_job(task: Task) -> bool:
    """Say whether a run waits or lives already, and print so."""
    try:
        refuse_in_use(task.folder)
    except ConfigError as error:
        print(f"left alone: {error}")
        return True
    return False


def _figures(facts: RunFacts) -> Iterator[tuple[str, str]]:
    """Yield a run's last losses, or rewards where a stage has no loss of its own."""
    sources = facts.evaluation.get("sources", {})
    for name, record in [("training", facts.train), *sources.items()]:
        key = next((key for key in ("reward", "loss") if key in record), None)
        if key is not None:
            yield f"{name} {key}", f"{record[key]:.4f}"


def _print(table: Table) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    console.print("\n", table)
