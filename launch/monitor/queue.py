"""The user's jobs as ``squeue`` lists them: one call for all, and that seldom."""

from __future__ import annotations

import getpass
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

from launch.slurm_queue import plain_environment
from trainer.metrics.life import read_time

EVERY_S = 60.0  # NCHC forbids `watch squeue`: the controller serves everybody
TIMEOUT_S = 20.0
FIELDS = ("%A", "%i", "%T", "%e", "%S", "%r", "%N")  # what may hold spaces stands last
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY",
         "BOOT_FAIL", "DEADLINE", "REVOKED"}  # fmt: skip
HELD = {"JobHeldUser", "JobHeldAdmin", "DependencyNeverSatisfied", "launch_failed_requeued_held"}


@dataclass(frozen=True)
class Job:
    """One job; times are seconds since the epoch, None where Slurm does not know yet.

    A task of an array has two numbers: ``ARRAY_TASK``, and its own one, which its lives note.
    """

    number: str
    state: str
    reason: str
    ends: float | None  # when its time limit is over
    starts: float | None  # began, or is expected to
    nodes: str
    own_number: str = ""

    @property
    def is_pending(self) -> bool:
        """Return whether it waits."""
        return self.state == "PENDING"

    @property
    def is_active(self) -> bool:
        """Return whether it holds nodes."""
        return not self.is_pending and self.state not in ENDED

    @property
    def is_held(self) -> bool:
        """Return whether it waits for a person."""
        return self.is_pending and self.reason in HELD


class Queue:
    """What ``squeue`` said last; asked again at most once in ``EVERY_S`` seconds."""

    def __init__(
        self,
        is_on: bool = True,
        run: Callable[[], str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; nothing is asked before somebody wants to know.

        Args:
            is_on: False never asks.
            run: returns squeue's output or raises OSError or SubprocessError; default calls it.
            clock: seconds that only grow.
        """
        self.problem = ""
        self._is_on, self._run, self._clock = is_on, run or call_squeue, clock
        self._asked: float | None = None
        self._jobs: dict[str, Job] | None = None

    def jobs(self) -> dict[str, Job] | None:
        """Return the user's jobs by number, None when Slurm cannot be asked (``problem``)."""
        if not self._is_on or (self._asked is not None and self._clock() - self._asked < EVERY_S):
            return self._jobs
        self._asked = self._clock()
        try:
            self._jobs, self.problem = parse_jobs(self._run()), ""
        except FileNotFoundError:  # no Slurm here: nothing to tell
            self._is_on, self._jobs = False, None
        except subprocess.CalledProcessError as error:
            reason = (error.stderr or "").strip() or f"exit code {error.returncode}"
            self._jobs, self.problem = None, f"squeue failed: {reason}"
        except (OSError, subprocess.SubprocessError) as error:
            self._jobs, self.problem = None, f"squeue failed: {error}"
        return self._jobs


def call_squeue() -> str:
    """Return the lines of all of the user's jobs that Slurm still knows, ended ones too."""
    command = ["squeue", "--noheader", "--array", "--states=all", f"--user={getpass.getuser()}"]
    environ = {**plain_environment(), "SLURM_TIME_FORMAT": "%s"}
    return subprocess.run(
        [*command, "--format=" + "|".join(FIELDS)],
        env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
        timeout=TIMEOUT_S,
    ).stdout  # fmt: skip


def parse_jobs(text: str) -> dict[str, Job]:
    """Return jobs by number; tasks of an array also as ``ARRAY_TASK``."""
    jobs = {}
    for line in text.splitlines():
        cells = line.strip().split("|", len(FIELDS) - 1)
        if len(cells) < len(FIELDS):
            continue  # a line of a plugin or a site's wrapper
        number, shown, state, ends, starts, reason, nodes = cells
        times = read_slurm_time(ends), read_slurm_time(starts)
        job = Job(shown, state, reason, *times, nodes, number)
        jobs[shown] = job
        if number == shown or not job.is_pending:  # tasks that wait all have the array's number
            jobs[number] = job
    return jobs


def read_slurm_time(text: str) -> float | None:
    """Return seconds since the epoch; old versions of Slurm write local ISO time regardless."""
    return float(text) if text.isdigit() else read_time(text)
