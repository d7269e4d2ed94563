"""What a user does on a cluster: submit, look, wait, cancel."""

from __future__ import annotations

import os
import re
import subprocess
import time
from datetime import datetime, timedelta
from pathlib import Path

from cluster_nodes import ClusterError, call

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
REVOKED_S = 3  # nodes refuse a job whose credential is not newer than the one just revoked
TIMEOUT_S = 600  # for a machine on which much else runs
REQUEUE_GRACE_S = 5  # a job that is put back into the queue looks ended for a moment


class Jobs:
    """Slurm's commands on one cluster."""

    folder: Path

    @property
    def config_path(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def environ(self) -> dict[str, str]:
        """Return this process's environment with the cluster in it."""
        return {**os.environ, "SLURM_CONF": str(self.config_path)}

    def call(self, *command: str | Path, timeout_s: float = 60) -> str:
        """Run a command with this cluster as its own; return what it printed."""
        return call("env", f"SLURM_CONF={self.config_path}", *command, timeout_s=timeout_s)

    def submit(self, script: str, *options: str, **environ: str) -> str:
        """Submit the text of a batch script; return the job's number.

        Raises:
            ClusterError: with Slurm's words, when it refuses.
        """
        done = subprocess.run(
            ["sbatch", "--parsable", *options], input=script, text=True, capture_output=True,
            env={**self.environ, **environ}, timeout=60,
        )  # fmt: skip
        if done.returncode:
            raise ClusterError(done.stderr)
        return done.stdout.strip().partition(";")[0]

    def show(self, job: str) -> dict[str, str]:
        """Return what Slurm knows of a job (of an array: of its first line)."""
        return self.show_all(job)[0]

    def show_all(self, job: str) -> list[dict[str, str]]:
        """Return what Slurm knows of a job and the tasks of its array."""
        lines = self.call("scontrol", "--oneliner", "show", "job", job).splitlines()
        pattern = re.compile(r"([A-Z][\w/:]*)=(.*?)(?=\s+[A-Z][\w/:]*=|\s*$)")
        return [dict(pattern.findall(line)) for line in lines if line.strip()]

    def wait(self, job: str, *states: str, timeout_s: float = TIMEOUT_S) -> dict[str, str]:
        """Wait for a job to be in one of ``states``; a requeued job need not wait for its turn.

        Raises:
            ClusterError: when it ends otherwise, with the end of its output.
        """
        deadline = time.monotonic() + timeout_s
        ended_since = None
        while True:
            shown = self.show(job)
            state = shown["JobState"]
            if state in states:
                return shown
            self.hurry(shown)
            now = time.monotonic()
            ended_since = (ended_since or now) if state in ENDED else None
            if now > deadline or (ended_since and now > ended_since + REQUEUE_GRACE_S):
                raise ClusterError(f"job {job} is {state}, not {states}\n{self.describe(shown)}")
            time.sleep(0.2)

    def wait_for_restart(self, job: str, restarts: int = 1, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until a job was put back into the queue and runs again."""
        deadline = time.monotonic() + timeout_s
        while True:
            shown = self.wait(job, "RUNNING", "COMPLETED", timeout_s=timeout_s)
            if int(shown["Restarts"]) >= restarts:
                return
            if time.monotonic() > deadline or shown["JobState"] == "COMPLETED":
                raise ClusterError(f"job {job} did not restart\n{self.describe(shown)}")
            time.sleep(0.2)

    def hurry(self, shown: dict[str, str]) -> None:
        """Let a requeued job wait for seconds, not until its old credential has expired."""
        if shown["Reason"] != "BeginTime" or shown["Restarts"] == "0":
            return
        begin = datetime.fromisoformat(shown["EligibleTime"])
        if begin > datetime.now() + timedelta(seconds=REVOKED_S + 1):
            when = f"starttime=now+{REVOKED_S}"
            self.call("scontrol", "update", f"jobid={shown['JobId']}", when)

    def cancel(self, job: str, *options: str) -> None:
        self.call("scancel", *options, job)

    def empty(self) -> None:
        """Cancel all jobs."""
        if jobs := self.call("squeue", "-h", "-o", "%A").split():
            self.call("scancel", *set(jobs))

    def describe(self, shown: dict[str, str]) -> str:
        """Return a job's facts and the end of what it printed."""
        text = "\n".join(f"{key}={value}" for key, value in shown.items())
        output = Path(shown.get("StdOut", ""))
        if output.is_file():
            text += f"\n--- {output}\n" + output.read_text(errors="replace")[-4000:]
        return text
