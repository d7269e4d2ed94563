"""All checks of this machine: a login node, a laptop, or one node of a job."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from launch.checks import artefacts, devices, files, network, packages, quota, scheduler
from launch.checks.finding import Finding
from launch.planning import plan_config
from trainer.config import ClusterConfig, RunConfig
from trainer.errors import ConfigError


def examine(config: RunConfig) -> list[Finding]:
    """Return the findings of every topic, in the order of the table."""
    cluster, in_job = config.cluster, "SLURM_JOB_ID" in os.environ
    run_dir = Path(config.run_dir)
    checks: list[Callable[[], list[Finding]]] = [
        lambda: packages.judge(packages.gather()),
        lambda: devices.judge(devices.gather(config.engine, in_job and needs_gpus(cluster))),
        lambda: scheduler.judge(scheduler.gather(cluster), cluster),
        lambda: examine_folders(config, with_scratch=in_job),
        lambda: quota.judge(quota.gather(files.nearest_folder(run_dir)), cluster.site.quota_gb),
        lambda: network.judge(network.gather(cluster.site.interface, meeting_port()), in_job),
        lambda: artefacts.judge(artefacts.gather(config)),
    ]
    return [finding for check in checks for finding in check()]


def examine_folders(config: RunConfig, with_scratch: bool) -> list[Finding]:
    """Judge the folders of a run; node-local scratch is there on compute nodes only."""
    run_folder = files.gather("run folder", Path(config.run_dir))
    findings = files.judge(run_folder, is_run_folder=True)
    findings += files.judge_room(run_folder, planned_bytes(config))
    findings += files.judge(files.gather("token stores", Path(config.data.store_dir)))
    findings += files.judge(files.gather("home", Path.home()))
    scratch = config.cluster.site.local_scratch
    if with_scratch and scratch is not None:
        findings += files.judge(files.gather("node-local scratch", Path(scratch)))
    return findings


def planned_bytes(config: RunConfig) -> float:
    """Return what all checkpoints of a run will take; 0 when its model cannot be planned."""
    try:
        plan = plan_config(config)
    except ConfigError:  # the model's files are missing, which the check of artefacts tells
        return 0.0
    return plan.disk_bytes if plan else 0.0


def needs_gpus(cluster: ClusterConfig) -> bool:
    """Return whether ranks of this profile compute on GPUs; not where that is unknown."""
    return bool(cluster.site.gpus_per_node)


def meeting_port() -> int:
    """Return the port that ranks would meet at: as launch/rendezvous.py chooses under Slurm."""
    given = os.environ.get("MASTER_PORT")
    return int(given) if given else 20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 10000
