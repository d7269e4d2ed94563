"""What submissions leave in a run's folder: config, code, script and ``submit.json``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch import run_folder
from launch.json_file import read_json, write_json
from launch.slurm import SlurmJob, render
from launch.slurm_queue import job_state
from launch.snapshot import copy_code
from launch.tenancy import life_sign
from trainer.config import RunConfig, load_config
from trainer.deadline import name_ranks
from trainer.errors import ConfigError
from trainer.lease import read_holder
from trainer.lives import CHECKPOINTS_NAME, STOP_NAME, newest_step, read_lives, slurm_life, utc_now
from trainer.metrics.run_facts import SUBMISSION_NAME

SCRIPT = "job.sbatch"
LOGS = "logs"


def refuse_in_use(run_dir: Path, own_job: str | None = None) -> None:
    """Raise ConfigError when a life or a job that waits has the run's folder."""
    for job in read_submission(run_dir).get("job_ids", []):
        if job != own_job and (state := job_state(job)):
            raise ConfigError(
                f"run_dir={run_dir} is in use: its job {job} is {state}; wait for it, end it "
                f"(`kuroshio stop {run_dir}`, or scancel {job}), or give another run_dir"
            )
    holder = read_holder(run_dir) if run_dir.is_dir() else None
    sign = holder and life_sign(holder, slurm_life(os.environ), time.time(), job_state)
    if holder and sign:
        raise ConfigError(
            f"run_dir={run_dir} is in use by job {holder.job or 'none'} on {holder.host} ({sign}); "
            f"end it (`kuroshio stop {run_dir}`), or give another run_dir"
        )


def forget_stop(run_dir: Path) -> None:
    """Remove a request to stop that nobody honoured: it would end the new job at its start.

    Raises:
        StorageError: it cannot be removed.
    """
    with run_folder.writing(run_dir):
        (run_dir / STOP_NAME).unlink(missing_ok=True)


def freeze(run_dir: Path, config: RunConfig) -> dict[str, list[Any]]:
    """Freeze the config in the run's folder, or find there the same one; return what changed.

    Ranks replace some values by what the data say (``loop.max_steps`` of epochs): whatever is asked
    for as at the last submission keeps the value that it got then. Where no life has begun, as when
    Slurm refused the job or the ranks the config, there is nothing that another config would spoil.

    Raises:
        ConfigError: the folder belongs to a run of another config.
    """
    path = run_dir / run_folder.CONFIG_FILE
    if newest_step(run_dir) == 0 and not any("started" in life for life in read_lives(run_dir)):
        with run_folder.writing(run_dir):
            path.unlink(missing_ok=True)
        return run_folder.claim(run_dir, config)
    before = read_submission(run_dir).get("asked")
    if before is not None and path.exists():
        now = run_folder.plain(config)
        settled = load_config(keep_settled(before, now, run_folder.read(path)))
        return run_folder.claim(run_dir, settled)
    return run_folder.claim(run_dir, config)


def keep_settled(
    before: Mapping[str, Any], now: Mapping[str, Any], settled: Mapping[str, Any]
) -> dict[str, Any]:
    """Return ``now`` with the ``settled`` value of each key that is asked for as ``before``."""
    result = {}
    for key, value in now.items():
        if isinstance(value, Mapping) and isinstance(settled.get(key), Mapping):
            old = before.get(key)
            old = old if isinstance(old, Mapping) else {}
            result[key] = keep_settled(old, value, settled[key])
        else:
            same = key in before and before[key] == value and key in settled
            result[key] = settled[key] if same else value
    return result


def write_job(job: SlurmJob) -> Path:
    """Write snapshot, folder of logs and script of a job; return the script.

    Raises:
        ConfigError: the site has no environment file.
        StorageError: the folder cannot be written.
    """
    folder = Path(job.folder)
    with run_folder.writing(folder):
        (folder / LOGS).mkdir(parents=True, exist_ok=True)  # sbatch says nothing of a missing one
        copy_code(Path(job.code))
        script = folder / SCRIPT
        script.write_text(render(job), encoding="utf-8")
    return script


def read_submission(run_dir: Path) -> dict[str, Any]:
    """Return what was recorded of a run's submissions; empty when it never was submitted.

    Raises:
        CheckpointError: the record is damaged.
    """
    return read_json(run_dir / SUBMISSION_NAME) or {}


def record(
    run_dir: Path,
    number: str,
    job: SlurmJob,
    config: RunConfig,
    plan: Mapping[str, Any] | None,
    changes: Mapping[str, Any],
) -> None:
    """Write ``submit.json``: the jobs of the run, what was asked for and what was planned."""
    facts = {
        "job_ids": [*read_submission(run_dir).get("job_ids", []), number],
        "submitted": utc_now(),
        "directory": str(Path.cwd()),  # what relative paths of the config mean
        "cluster": config.cluster.site.name,
        "parents": list(job.parents),
        "changes": dict(changes),
        "plan": plan,
        "asked": run_folder.plain(config),
    }
    with run_folder.writing(run_dir):
        write_json(run_dir / SUBMISSION_NAME, facts)


def record_again(run_dir: Path, number: str) -> None:
    """Note one more job in ``submit.json``, of a script that was submitted again."""
    known = read_submission(run_dir)
    with run_folder.writing(run_dir):
        jobs = [*known.get("job_ids", []), number]
        write_json(run_dir / SUBMISSION_NAME, {**known, "job_ids": jobs})


def measured_seconds(run_dir: Path, num_ranks: int) -> dict[str, float]:
    """Return what the newest checkpoint says of the time of steps and saves; empty without one.

    Args:
        run_dir: the run's folder.
        num_ranks: what fewer or more ranks measured says nothing of these. Their device is not
            known before the job: the longest time of any counts.
    """
    for manifest in sorted((run_dir / CHECKPOINTS_NAME).glob("step_*/manifest.json"), reverse=True):
        try:
            measured = json.loads(manifest.read_text(encoding="utf-8"))["state"]["seconds"]
        except (ValueError, KeyError, RecursionError):  # damaged, or older than measuring
            continue
        found: dict[str, float] = {}
        for ranks, seconds in measured.items():
            if ranks.startswith(name_ranks(num_ranks, "")):
                found |= {work: max(s, found.get(work, 0.0)) for work, s in seconds.items()}
        return found
    return {}
