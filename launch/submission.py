"""Turning a configuration into a job: run folder, snapshot, script, submission. Never torch."""

from __future__ import annotations

import hashlib
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch import ROOT, sbatch
from launch.file_modes import private_files
from launch.job_folder import (
    forget_stop,
    freeze,
    measured_seconds,
    read_submission,
    record,
    refuse_in_use,
    write_job,
)
from launch.planning import plan_config
from launch.run_folder import writing
from launch.secrets import open_file_problems
from launch.slurm import SHORT_SIGNAL_S, SlurmJob, job_of, one_task
from launch.snapshot import copy_code
from trainer.config import ClusterConfig, RunConfig, load_config
from trainer.config.cluster import check_submission, one_gpu, partition_limits, time_limit_s
from trainer.errors import ConfigError
from trainer.plan.work import RunPlan
from trainer.stages import SINGLE_PROCESS

CODE = "code"
# Seconds before the time limit at which the ranks are told to save. They measure their steps and
# saves and stop in time by themselves; this is for what they cannot foresee.
SIGNAL_S = 300  # until a checkpoint says how long steps and saves take
SAVE_MARGIN = 2.0  # a shared file system may be twice as slow the next time
DELIVERY_S = 60  # Slurm may send a signal a minute early


@dataclass(frozen=True)
class Draft:
    """A job that could be submitted: everything is checked, nothing written."""

    config: RunConfig
    job: SlurmJob
    plan: RunPlan | None  # None: a stage without a GPU, or a model that its parents still write


def draft(
    values: Mapping[str, Any],
    run_dir: Path,
    parents: Sequence[str] = (),
    must_fit: bool = True,
) -> Draft:
    """Check a run against its cluster's profile and its plan; read and write nothing of the run.

    Args:
        values: the run's plain configuration.
        run_dir: its folder.
        parents: jobs that it waits for. What they will write cannot be checked yet.
        must_fit: refuse a run that cannot be by its plan.

    Raises:
        ConfigError: with every problem found, one per line.
    """
    folder = run_dir.expanduser().absolute()
    config = load_config({**values, "run_dir": str(folder)})
    account = config.cluster.account or os.environ.get("SBATCH_ACCOUNT") or None
    config = replace(config, cluster=replace(config.cluster, account=account))
    problems = [*check_submission(config.cluster), *_check_nodes(config)]
    plan, job = None, None
    try:
        job = _job(config, folder, parents)
    except ConfigError as error:
        problems.append(str(error))
    try:
        plan = plan_config(config)
    except ConfigError as error:
        problems += [] if parents else [str(error)]
    if plan is not None and must_fit:
        problems += [f"{problem} (--force submits all the same)" for problem in plan.problems]
    if problems or job is None:
        raise ConfigError("\n".join(problems))
    return Draft(config, job, plan)


def submit_run(values: Mapping[str, Any], run_dir: Path, parents: Sequence[str] = ()) -> str:
    """Write a run's folder and submit its job; see ``draft`` for the arguments.

    Returns:
        The number of the job.

    Raises:
        ConfigError: a problem of the config, a run folder in use, or a refusal of Slurm.
        StorageError: the folder cannot be written.
    """
    return submit_draft(draft(values, run_dir, parents))[0]


def submit_draft(checked: Draft) -> tuple[str, str | None]:
    """Write the folder of a checked run and submit its job.

    Returns:
        The number of the job, and when Slurm thinks that it would start.

    Raises:
        ConfigError: a run folder in use or of another run, or a refusal of Slurm.
        StorageError: the folder cannot be written.
    """
    folder = Path(checked.job.folder)
    sbatch.require_slurm(checked.config.cluster.site.name)
    refuse_in_use(folder)
    with private_files(checked.config.cluster.share_with_group):
        forget_stop(folder)
        changes = freeze(folder, checked.config)
        script = write_job(checked.job)
        start = sbatch.estimate_start(script)
        with sbatch.all_or_none() as jobs:
            jobs.append(sbatch.submit_script(script))
            _record(checked, jobs[0], changes)
    return jobs[0], start


def submit_array(drafts: Sequence[Draft], folder: Path, at_once: int) -> str:
    """Submit several runs as one array of jobs, of which ``at_once`` run at the same time.

    Args:
        drafts: checked runs, on the same cluster.
        folder: of the sweep; holds the list of runs, the code and the scripts' output.
        at_once: tasks that may run together.

    Returns:
        The number of the array.

    Raises:
        ConfigError: the runs ask for different machines, a run folder is in use, or Slurm refuses.
        StorageError: a folder cannot be written.
    """
    folder = folder.expanduser().absolute()
    first = drafts[0]
    if any(other.config.cluster != first.config.cluster for other in drafts):
        raise ConfigError("cluster.*: the tasks of an array need the same machines; submit apart")
    sbatch.require_slurm(first.config.cluster.site.name)
    for each in drafts:
        refuse_in_use(Path(each.job.folder))
    runs = "".join(f"{each.job.folder}\n" for each in drafts)
    # Of their own: tasks of an earlier array may still wait, for other runs in the same folder.
    tag = hashlib.sha256(runs.encode()).hexdigest()[:8]
    list_file = folder / f"runs-{tag}.txt"
    job = replace(
        first.job,
        folder=str(folder),
        code=str(folder / f"{CODE}-{tag}"),
        array=f"0-{len(drafts) - 1}%{at_once}",
        list_file=str(list_file),
        signal_s=max(each.job.signal_s for each in drafts),
        prepares=any(each.job.prepares for each in drafts),
    )
    with private_files(first.config.cluster.share_with_group):
        for each in drafts:
            forget_stop(Path(each.job.folder))
        changes = [freeze(Path(each.job.folder), each.config) for each in drafts]
        script = write_job(job)
        with writing(folder):
            list_file.write_text(runs, encoding="utf-8")
        with sbatch.all_or_none() as jobs:
            jobs.append(sbatch.submit_script(script))
            for index, (each, changed) in enumerate(zip(drafts, changes, strict=True)):
                _record(each, f"{jobs[0]}_{index}", changed)
    return jobs[0]


def submit_command(
    argv: Sequence[str],
    folder: Path,
    cluster: ClusterConfig,
    parents: Sequence[str] = (),
    name: str = "kuroshio",
) -> str:
    """Submit one process on one node, with one GPU where the site's jobs have GPUs.

    Args:
        argv: words for ``kuroshio``; ``-m MODULE …`` runs a module of the project.
        folder: gets ``code/``, ``logs/`` and the script.
        cluster: where; of its GPUs a node, one is used.
        parents: jobs that it waits for.
        name: of the job.

    Returns:
        The job's number.

    Raises:
        ConfigError: a value that has no place in a job script, or a refusal of Slurm.
        StorageError: the folder cannot be written.
    """
    folder, cluster = folder.expanduser().absolute(), one_gpu(cluster)
    if problems := check_submission(cluster):
        raise ConfigError("\n".join(problems))
    sbatch.require_slurm(cluster.site.name)
    job = job_of(cluster, name, str(folder), str(folder / CODE))
    job = replace(one_task(job, tuple(argv), cluster), parents=tuple(parents))
    with private_files(cluster.share_with_group):
        return sbatch.submit_script(write_job(job))


def enter_job(values: Mapping[str, Any]) -> Path:
    """Write a run's folder from inside a job that was submitted by hand; return the folder.

    A restarted job goes on with the config and the code of its first life, whatever the checkout
    has become since.

    Raises:
        ConfigError: with every problem found, or a run folder in use.
        StorageError: the folder cannot be written.
    """
    folder = Path(str(values["run_dir"])).expanduser().absolute()
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        raise ConfigError("--inside-job: SLURM_JOB_ID is not set; leave the flag out to submit")
    if job in read_submission(folder).get("job_ids", []):
        return folder
    checked = draft(values, folder)
    refuse_in_use(folder, own_job=job)
    with private_files(checked.config.cluster.share_with_group):
        forget_stop(folder)
        changes = freeze(folder, checked.config)
        copy_code(folder / CODE)
        _record(checked, job, changes)
    return folder


def signal_seconds(cluster: ClusterConfig, measured: Mapping[str, float]) -> int:
    """Return how long before the time limit the ranks are told to save.

    Args:
        cluster: with the job's time limit.
        measured: seconds of each kind of work of the run, ``save`` and what stops for no signal.
    """
    limit = time_limit_s(cluster)
    seconds = SIGNAL_S if limit is not None else SHORT_SIGNAL_S
    if "save" in measured:
        work = max((s for name, s in measured.items() if name != "save"), default=0.0)
        seconds = DELIVERY_S + math.ceil(work + SAVE_MARGIN * measured["save"])
    return seconds if limit is None else min(seconds, limit // 2)


def _record(checked: Draft, number: str, changes: Mapping[str, Any]) -> None:
    plan = checked.plan.as_dict() if checked.plan else None
    folder = Path(checked.job.folder)
    record(folder, number, checked.job, checked.config, plan, changes)


def _job(config: RunConfig, folder: Path, parents: Sequence[str]) -> SlurmJob:
    cluster = config.cluster
    job = job_of(cluster, config.name, str(folder), str(folder / CODE))
    if config.stage.get("name") in SINGLE_PROCESS:
        if (least := partition_limits(cluster).min_gpus) > 1:
            raise ConfigError(
                f"cluster.partition={job.partition} is for {least} GPUs or more, but "
                f"stage={config.stage['name']} is one process with one GPU; use "
                f"cluster.partition={one_gpu(cluster).partition}"
            )
        job = one_task(job, (), cluster)
    return replace(
        job,
        parents=tuple(parents),
        prepares=bool(config.data.sources) and config.stage.get("name") not in SINGLE_PROCESS,
        signal_s=signal_seconds(cluster, measured_seconds(folder, job.nodes * job.tasks_per_node)),
    )


def _check_nodes(config: RunConfig) -> Iterator[str]:
    cluster = config.cluster
    site, arch = cluster.site, partition_limits(cluster).arch or cluster.site.arch
    if config.log.wandb == "online" and site.internet is False:
        yield (
            f"log.wandb=online: compute nodes of {site.name} do not reach the internet; use "
            "log.wandb=offline and `wandb sync` afterwards"
        )
    if config.log.wandb == "online":
        yield from open_file_problems(os.environ)
    if arch is not None and arch != platform.machine() and cluster.image is None:
        yield (
            f"the nodes are {arch}, this machine is {platform.machine()}: its Python does not run "
            "there; submit from such a node, or give cluster.image=FILE.sif"
        )
    if site.scheduler == "slurm" and not (ROOT / "slurm/env" / f"{site.name}.sh").is_file():
        yield (
            f"cluster.site.name={site.name}: slurm/env/{site.name}.sh is missing; copy "
            "slurm/env/generic_slurm.sh and load there what your environment needs"
        )
