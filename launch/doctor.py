"""``kuroshio doctor``: is this machine, or are these nodes, fit for a run?"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launch.checks import job, machine, table
from launch.checks.finding import Finding, as_data, exit_code
from launch.checks.rank_plan import CheckPlan, find_place, read_plan
from launch.compose import compose_config
from trainer.config import RunConfig
from trainer.errors import ConfigError

DEFAULT_WAIT_S = 120.0  # Python and torch from a cold parallel file system
DESCRIPTION = """Look whether a run would work here: software, Slurm, folders, network, files.
With --nodes, a short job measures nodes and the links between them, and names the slow or broken
one. Every finding has a remedy; the exit code is 78 when one is an error, else 0."""


def main(arguments: Sequence[str]) -> int:
    """Look, show what was found, and return 78 when a run would fail of it, else 0."""
    options = _parse(arguments)
    if options.ranks:
        return _be_rank(options.ranks.split(","))
    if options.read:
        return report(job.read(Path(options.read).expanduser()), options.json)
    config = take_account(compose_config(options.overrides), os.environ)
    if options.nodes is None:
        return report(machine.examine(config), options.json)
    return report(examine_nodes(config, options.nodes, options.timeout), options.json)


def take_account(config: RunConfig, environ: Mapping[str, str]) -> RunConfig:
    """Return ``config`` with the account of sbatch's own variable, as `submit` does."""
    account = config.cluster.account or environ.get("SBATCH_ACCOUNT") or None
    return replace(config, cluster=replace(config.cluster, account=account))


def examine_nodes(config: RunConfig, num_nodes: int, wait_s: float) -> list[Finding]:
    """Measure ``num_nodes`` nodes: in a job of their own, or in the one that we are in.

    Raises:
        ConfigError: several nodes without a scheduler, or a job that Slurm refuses.
        StorageError: the folder beside the run's cannot be written.
    """
    cluster = replace(config.cluster, nodes=num_nodes)
    plan = job.plan_check(config, job.name_folder(config), wait_s)
    if cluster.site.scheduler == "none":
        if num_nodes > 1:
            raise ConfigError(
                f"--nodes {num_nodes}: cluster={cluster.site.name} has no scheduler that could "
                "give them; use --nodes 1, or name a cluster of conf/cluster with cluster=NAME"
            )
        job.run_here(plan)
    elif "SLURM_JOB_ID" in os.environ:
        job.run_in_job(plan, cluster)
    else:
        _wait(job.submit(plan, cluster), plan)
    _say(f"what every rank said is in {plan.folder}")
    return job.read(Path(plan.folder))


def _wait(number: str, plan: CheckPlan) -> None:
    _say(f"job {number} is submitted; Ctrl-C leaves it there")
    try:
        job.wait(number, plan, _say)
    except KeyboardInterrupt:
        folder = shlex.quote(plan.folder)
        _say(f"job {number} goes on; kuroshio doctor --read {folder} shows its result")
        sys.exit(128 + signal.SIGINT)


def report(findings: list[Finding], as_json: bool) -> int:
    """Print ``findings``; return the exit code they stand for."""
    if as_json:
        print(json.dumps(as_data(findings), ensure_ascii=False, indent=1))
    else:
        table.show(findings)
    return exit_code(findings)


def _be_rank(nodes: Sequence[str]) -> int:
    from launch.checks import rank  # torch

    rank.run(find_place(read_plan(sys.stdin.read()), nodes, os.environ))
    sys.stdout.flush()
    os._exit(0)  # threads of a backend that lost a node would hold us up


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kuroshio doctor", description=DESCRIPTION, allow_abbrev=False
    )
    parser.add_argument("overrides", nargs="*", metavar="GROUP=OPTION | KEY=VALUE")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--nodes", type=int, metavar="N", help="measure N nodes, by a job of them")
    parser.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_WAIT_S,
        metavar="SECONDS",
        help=f"give up a node that is silent for longer ({DEFAULT_WAIT_S:g})",
    )
    parser.add_argument("--read", metavar="FOLDER", help="show the result of an earlier --nodes")
    # What the job of --nodes starts on every node.
    parser.add_argument("--ranks", metavar="NODE,NODE", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    if options.nodes is not None and options.nodes < 1:
        raise ConfigError(
            f"--nodes {options.nodes}: give the number of nodes to measure, 1 or more"
        )
    return options
