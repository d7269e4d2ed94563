"""Handing scripts to Slurm."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import ConfigError

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

    Raises:
        ConfigError: Slurm would refuse the job, in its words.
    """
    found = _START.search(_sbatch(["--test-only", str(script)]))
    return found[1] if found else None


def submit_script(script: Path) -> str:
    """Submit a job and return its number.

    Raises:
        ConfigError: Slurm refuses the job, in its words.
    """
    printed = _sbatch(["--parsable", str(script)])
    number = printed.strip().splitlines()[-1].partition(";")[0]  # ;NAME where there are clusters
    if not number.isdigit():
        raise ConfigError(f"sbatch printed {printed!r} instead of a job number; see squeue --me")
    return number


def _sbatch(arguments: Sequence[str]) -> str:
    # Variables such as SBATCH_PARTITION would replace the script's own lines unseen.
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SBATCH_")}
    command = ["sbatch", *arguments]
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
