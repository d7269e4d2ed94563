"""What Slurm says of a job that was submitted: its state and the time it has left."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import time
from collections.abc import Mapping

LOG = logging.getLogger(__name__)
TIMEOUT_S = 30
# States in which a job's processes run; PENDING is a job that waits, also for its next life.
LIVING = ("RUNNING", "CONFIGURING", "STOPPED", "SUSPENDED", "SIGNALING", "STAGE_OUT")
ENDING = "COMPLETING"  # its processes have been told to end


def is_job_number(text: str) -> bool:
    """Return whether ``text`` is the number of a job or of an array's task, and nothing else.

    Numbers come from files of run folders, which may be another user's.
    """
    return re.fullmatch(r"[0-9]+(_[0-9]+)?", text, re.ASCII) is not None


def ask_squeue(job: str, column: str) -> str | None:
    """Return one column of squeue for a job: empty when Slurm knows no such job.

    None when Slurm cannot be asked: no squeue here, no controller that answers, or no job's number.
    """
    if not is_job_number(job):
        LOG.warning("%r is no job's number: Slurm is not asked", job)
        return None
    command = ["squeue", "--noheader", f"--jobs={job}", f"--format=%A {column}"]
    try:
        done = subprocess.run(
            command, env=plain_environment(), capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        LOG.warning("`%s` failed: %s", " ".join(command), error)
        return None
    if done.returncode == 0:
        return _own_line(job, done.stdout)
    if "Invalid job id" in done.stderr:
        return ""
    LOG.warning("`%s` failed: %s", " ".join(command), done.stderr.strip())
    return None


def plain_environment() -> dict[str, str]:
    """Return the environment without variables such as ``SQUEUE_STATES``, which hide jobs."""
    return {key: value for key, value in os.environ.items() if not key.startswith("SQUEUE_")}


def _own_line(job: str, text: str) -> str:
    """Return what squeue says of one job: asked for an array's number, it lists every task.

    That number is also the own one of the array's last task.
    """
    lines = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    own = [line for line in lines if line[0] == job or "_" in job]  # ARRAY_TASK names one task
    return own[0][1].strip() if own and len(own[0]) > 1 else ""


def array_task(environ: Mapping[str, str]) -> str | None:
    """Return the name by which Slurm takes this job alone, None outside of a job.

    ``scontrol requeue`` of an array's number starts all of its tasks again, finished ones too.
    """
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environ.get("SLURM_JOB_ID")


def job_state(job: str) -> str | None:
    """Return a job's state (``RUNNING``, …), empty when it is gone, None if nobody knows."""
    return ask_squeue(job, "%T")


def time_left_s(job: str) -> float | None:
    """Return the seconds until a job's time limit, None when there is none or nobody knows."""
    return parse_time_left(ask_squeue(job, "%L") or "")


def job_time_limit(environ: Mapping[str, str]) -> float | None:
    """Return when Slurm ends this job, in seconds since the epoch; None outside or without limit.

    ``SLURM_JOB_END_TIME`` is there since Slurm 22.05; older ones are asked, by rank 0 only.
    """
    job, end = environ.get("SLURM_JOB_ID"), environ.get("SLURM_JOB_END_TIME", "")
    if job is None:
        return None
    if end.isdigit():
        return float(end)
    left = time_left_s(job)
    return None if left is None else time.time() + left


def parse_time_left(text: str) -> float | None:
    """Return the seconds of ``D-HH:MM:SS``, ``HH:MM:SS`` or ``MM:SS``, None for a word."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds
