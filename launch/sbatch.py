"""Handing scripts to Slurm."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.errors import ConfigError

LOG = logging.getLogger(__name__)
TIMEOUT_S = 60
_START = re.compile(r"to start at (\S+)")


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
        found = _START.search(_sbatch(["--test-only", str(script)]))
    except ConfigError as error:
        LOG.info("no estimate of the start: %s", error)
        return None
    return found[1] if found else None


def submit_script(script: Path, *flags: str) -> str:
    """Submit a job and return its number.

    Args:
        script: of the job.
        flags: of sbatch, which replace lines of the script.

    Raises:
        ConfigError: Slurm refuses the job, in its words.
    """
    printed = _sbatch(["--parsable", *flags, str(script)])
    number = printed.strip().splitlines()[-1].partition(";")[0]  # ;NAME where there are clusters
    if not number.isdigit():
        raise ConfigError(
            f"sbatch printed {printed!r} instead of a job number; see `squeue -u $USER`"
        )
    return number


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment from which a job takes over no more than its script says.

    ``SBATCH_PARTITION`` and the like would replace the script's own lines unseen. Submitted from
    inside a job, the new one would find that job's ``SLURM_RESTART_COUNT`` or ``SLURM_CPU_BIND``.
    """
    leave_out = ("SBATCH_", "SLURM_", "SRUN_")
    return {k: v for k, v in environ.items() if k == "SLURM_CONF" or not k.startswith(leave_out)}


def _sbatch(arguments: Sequence[str]) -> str:
    command, environ = ["sbatch", *arguments], clean_environment(os.environ)
    try:
        done = subprocess.run(
            command, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"sbatch did not answer for {TIMEOUT_S} s; try again later") from error
    if done.returncode:
        raise ConfigError(f"Slurm refuses the job: {_reason(done.stderr)}")
    return done.stdout + done.stderr


def _reason(text: str) -> str:
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in text.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line)) or "it does not say why"
