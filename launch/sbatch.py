"""Handing scripts to Slurm, and taking jobs back."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from launch.slurm_queue import is_job_number
from trainer.errors import ConfigError

LOG = logging.getLogger(__name__)
TIMEOUT_S = 60
_START = re.compile(r"to start at (\S+)")
_NUMBER = re.compile(r"^(\d+)(;\S+)?$", re.MULTILINE)  # ;NAME where there are several clusters


def require_slurm(cluster: str) -> None:
    """Raise ConfigError, saying what to do instead, where there is no ``sbatch``."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            f"cluster={cluster} takes jobs by sbatch, which this machine does not have: submit "
            "from a login node of the cluster; on a machine of your own use `kuroshio run`, or "
            "install Slurm (apt-get install slurm-client)"
        )


def estimate_start(script: Path) -> str | None:
    """Return when Slurm would start a job, as it writes times; None when it does not say.

    Slurm refuses to estimate what it would queue, such as any job while all nodes are drained for
    maintenance. Whether it takes a job is found by submitting it.
    """
    try:
        done = _sbatch(["--test-only", str(script)])
    except ConfigError as error:
        LOG.info("no estimate of the start: %s", error)
        return None
    found = _START.search(done.stderr)
    return found[1] if found else None


def submit_script(script: Path, *flags: str) -> str:
    """Submit a job and return its number.

    Args:
        script: of the job.
        flags: of sbatch, which replace lines of the script.

    Raises:
        ConfigError: Slurm refuses the job, in its words.
    """
    done = _sbatch(["--parsable", *flags, str(script)])
    # On standard output alone: sites have sbatch say more of a job on the other one.
    found = _NUMBER.search(done.stdout)
    if found is None:
        printed = (done.stdout + done.stderr).strip()
        raise ConfigError(
            f"sbatch printed {printed!r} instead of a job number; see `squeue -u $USER`"
        )
    return found[1]


@contextmanager
def all_or_none() -> Iterator[list[str]]:
    """Collect numbers of jobs; cancel all of them when the block fails.

    So no job is left that its run's folder does not know of, as when a quota is full by then.
    """
    jobs: list[str] = []
    try:
        yield jobs
    except BaseException:
        if problem := cancel(jobs):
            LOG.error("%s; they are still in the queue", problem)
        raise


def cancel(jobs: Sequence[str], *flags: str) -> str:
    """Take jobs out of the queue, or end them; return what went wrong, empty for nothing."""
    if not jobs:
        return ""
    if strange := [job for job in jobs if not is_job_number(job)]:
        return f"{strange} are no numbers of jobs: scancel was not called"
    command = ["scancel", *flags, *jobs]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"scancel {' '.join(jobs)} failed: {error}"
    if not done.returncode:
        return ""
    reason = done.stderr.strip() or f"exit code {done.returncode}"
    return f"scancel {' '.join(jobs)} failed: {reason}"


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment from which a job takes over no more than its script says.

    ``SBATCH_PARTITION`` and the like would replace the script's own lines unseen. Submitted from
    inside a job, the new one would find that job's ``SLURM_RESTART_COUNT`` or ``SLURM_CPU_BIND``.
    """
    leave_out = ("SBATCH_", "SLURM_", "SRUN_")
    return {k: v for k, v in environ.items() if k == "SLURM_CONF" or not k.startswith(leave_out)}


def _sbatch(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command, environ = ["sbatch", *arguments], clean_environment(os.environ)
    try:
        done = subprocess.run(
            command, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"sbatch did not answer for {TIMEOUT_S} s; Slurm may have taken the job all the same: "
            "look at `squeue -u $USER` before you try again"
        ) from error
    if done.returncode:
        raise ConfigError(f"Slurm refuses the job: {_reason(done.stderr)}")
    return done


def _reason(text: str) -> str:
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in text.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line)) or "it does not say why"
