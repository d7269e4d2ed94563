"""``kuroshio run``: one stage, on this machine or as one rank of a job."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from launch import local, rank_log, rendezvous, run_folder, tenancy, validation, world
from launch.file_modes import private_files, wants_sharing
from launch.graph import lineage
from launch.node_environment import node_name, prepare_node
from launch.prepare import ensure_prepared
from launch.rendezvous import Rendezvous
from launch.secrets import flatten, refuse_secrets
from launch.slurm_queue import job_time_limit
from launch.tenancy import Stay
from launch.validation import Run
from trainer.config import RunConfig, grad_accum_steps, load_config
from trainer.errors import EXIT_RESUME, ConfigError, LostRankError, StopRequestedError
from trainer.heartbeat import describe_rank
from trainer.lease import Lease
from trainer.lives import STOP_NAME, slurm_life
from trainer.stage import Context
from trainer.stages import SINGLE_PROCESS
from trainer.watchdog import Post, explain_loss, watching

LOG = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """Compose (or read) a config and run its stage; return the exit code."""
    _leave_on_signals()
    local.follow_parent(os.environ)
    options = _parse(arguments)
    values = _read_values(options)
    if options.dry_run:
        from launch import summary

        summary.show(validation.build_run(values))
        return 0
    found = rendezvous.detect(os.environ)
    if options.config not in (None, "-"):
        world.adopt_world(values, found, os.environ)
    with private_files(wants_sharing(values)):
        if found.launcher == "plain" and _num_ranks(values) > 1:
            return start_ranks(values)
        with rank_log.kept(values, found):
            return run_rank(values, found)


def run_rank(values: dict[str, Any], found: Rendezvous) -> int:
    """Run a stage as the rank ``found``; return the exit code."""
    with tenancy.recorded_stay(Path(str(values.get("run_dir"))), found.rank) as stay:
        _run_rank(values, found, stay)
    return 0


def _run_rank(values: dict[str, Any], found: Rendezvous, stay: Stay) -> None:
    found.export(os.environ)
    if found.rank == 0:
        lineage.begin_run(values.get("run_dir"))
    os.environ.setdefault("OMP_NUM_THREADS", str(local.threads_per_rank(found.local_world_size)))
    with _kept():
        name_accelerator()
        run = validation.build_run(values)
    if not run.stage.single_process:
        world.check_world(found, run.config.cluster)
        grad_accum_steps(run.config, found.world_size)  # refuses a world that does not divide
        if found.launcher == "plain" and run.config.data.sources:
            ensure_prepared(run.config)
        settled, remarks = validation.settle(run)
        for remark in remarks if found.rank == 0 else ():
            LOG.warning(remark)
        prepare_node(settled.config.cluster, found, os.environ)
        with _claimed(settled.config, run.config, found, stay):
            _run_together(settled, found, stay)
    elif found.rank == 0:  # a job of several ranks may hold such a stage: the others leave
        with _claimed(run.config, run.config, found, stay):
            run.stage.run(Context(run.config, stay.run_dir, lease=stay.lease))


@contextmanager
def _kept() -> Iterator[None]:
    """Import without the garbage collector, which would spend a third of that time in vain."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # modules stay: later collections need not look at them either
        gc.enable()


def name_accelerator() -> None:
    """Spare a machine without one DeepSpeed's search and its warning on every rank."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _run_together(run: Run, found: Rendezvous, stay: Stay) -> None:
    """Run a stage with the other ranks, if all of them are about to do the same."""
    from launch import agreement
    from trainer.engine.engine import init_distributed

    config, run_dir = run.config, stay.run_dir
    local_rank = rendezvous.device_index(found.local_rank, os.environ)
    with agreement.among_ranks(found.rank, lambda: _name_lost(config, found, stay)):
        agreement.join(config.cluster.timeout_s)
        if found.world_size > 1:
            agreement.refuse_disagreement(agreement.rank_facts(config, run_dir))
            if found.launcher == "slurm":
                agreement.refuse_crowding(config.cluster.nodes, node_name(os.environ))
        stay.lease = agreement.share_lease(run_dir, stay.lease)
        agreement.refuse_unusable_folder(stay.lease, found.rank, node_name(os.environ))
        with watching(_post(config, found, stay.lease), partial(stay.end, LostRankError.exit_code)):
            init_distributed(local_rank, config.cluster.timeout_s)
            limit = job_time_limit(os.environ) if found.rank == 0 else None
            place = (found.rank, found.world_size, local_rank)
            try:
                run.stage.run(Context(config, run_dir, *place, stay.lease, limit))
            except StopRequestedError as stop:
                # srun ends rank 0 once another one has left: first it says why they all do.
                if found.rank == 0:
                    stay.end(*tenancy.describe_error(stop))
                agreement.part()
                raise
            agreement.part()


def _post(config: RunConfig, found: Rendezvous, lease: Lease) -> Post:
    """Return where this rank's watchdog stands."""
    ranks = (found.rank, found.world_size)
    return Post(Path(config.run_dir), lease.token, *ranks, config.cluster.timeout_s)


def _name_lost(config: RunConfig, found: Rendezvous, stay: Stay) -> str:
    """Return who is gone when a collective has failed, empty where that is not known."""
    if stay.lease is None:
        return ""
    # A rank that fails says so before it leaves; one that is killed only falls silent.
    said = tenancy.read_failure(stay.run_dir, stay.lease.token, found.rank)
    return said or explain_loss(_post(config, found, stay.lease))


def _num_ranks(values: dict[str, Any]) -> int:
    """Return how many ranks the still unchecked ``values`` ask for on this machine."""
    if values.get("stage", {}).get("name") in SINGLE_PROCESS:
        return 1
    asked = values.get("cluster", {}).get("gpus_per_node")
    return asked if isinstance(asked, int) else 1


def start_ranks(values: dict[str, Any]) -> int:
    """Start the ranks of this machine; they check the stage, whose import takes seconds.

    Returns:
        The exit code of the whole.

    Raises:
        ConfigError: what is wrong with ``values``, or the run needs other machines too.
        DataError: sources that cannot be used.
    """
    try:
        config = load_config(values)
    except ConfigError:
        validation.build_run(values)  # names the stage's problems as well
        raise
    if config.cluster.nodes > 1:
        raise ConfigError(
            f"cluster.nodes={config.cluster.nodes}, but this process was started alone; start one "
            "task per GPU with srun, or torchrun or mpiexec on every node"
        )
    command = [sys.executable, "-m", "launch", "run", "--config", "-"]
    num_ranks = 1
    if config.stage["name"] not in SINGLE_PROCESS:
        num_ranks = config.cluster.gpus_per_node
        grad_accum_steps(config, num_ranks)
        if config.data.sources:
            ensure_prepared(config)  # here, where no rank waits for it behind a collective timeout
    run_dir = Path(config.run_dir)
    code = local.run_ranks(
        command, num_ranks, json.dumps(values), lambda rank: describe_rank(run_dir, rank)
    )
    tenancy.record_silent_end(run_dir, code)
    return code


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kuroshio run", add_help=False, allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--config", metavar="FILE")
    options, overrides = parser.parse_known_args(arguments)
    unknown = [word for word in overrides if word.startswith("-")]
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)}: no such flag; `kuroshio run` has --dry-run, --config FILE and "
            "--help, everything else is KEY=VALUE or GROUP=OPTION"
        )
    if options.config and overrides:
        raise ConfigError(
            f"--config={options.config} is a whole configuration, so {' '.join(overrides)} has no "
            "place beside it; leave one of them out"
        )
    options.overrides = overrides
    return options


def _read_values(options: argparse.Namespace) -> dict[str, Any]:
    """Return the run's plain configuration: composed, from a file or from standard input."""
    if options.config is None:
        from launch.compose import compose_values

        return compose_values(options.overrides)
    if options.config == "-":
        values: dict[str, Any] = json.load(sys.stdin)
        return values
    path = Path(options.config)
    values = run_folder.read(path)
    refuse_secrets(flatten(values))
    if path.name == run_folder.CONFIG_FILE:
        values["run_dir"] = str(path.parent)  # the folder may have been moved
    return values


def _leave_on_signals() -> None:
    """Let a signal end this rank as "resume me" until the training loop takes signals over."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(EXIT_RESUME)  # nothing was trained yet, so there is nothing to save

    for number in local.FORWARDED:
        signal.signal(number, leave)
    local.accept_signals()


@contextmanager
def _claimed(config: RunConfig, asked: RunConfig, found: Rendezvous, stay: Stay) -> Iterator[None]:
    """Hold the run folder on rank 0: nobody else may live in it during the block."""
    if found.rank != 0:
        yield
        return
    run_dir, same = stay.run_dir, (config, asked, validation.complete_section)
    run_folder.refuse_other_run(run_dir, *same)
    with run_folder.writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        stay.lease = lease = tenancy.take_lease(run_dir, os.environ)
        if slurm_life(os.environ)["job"] is None:  # whoever starts it by hand wants it to run
            (run_dir / STOP_NAME).unlink(missing_ok=True)
    changes = run_folder.claim(run_dir, *same)
    run_folder.record_life(run_dir, found.launcher, found.world_size, changes, lease.token)
    with lease.beating():
        yield
