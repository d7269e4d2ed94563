"""What disturbs a pipeline's jobs on the cluster of ``tests/slurm/cluster.py``."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cluster import Cluster
from cluster_nodes import end_processes
from cluster_runs import ranks_of

from benchmarks.long.killed_pipeline import hurry, journal
from launch.graph.state import StepState, read_states
from launch.slurm_queue import ENDING, LIVING
from trainer.metrics.life import read_time

POLL_S = 0.2
OUTAGE_S = 60.0  # Slurm gives the node up after about 20
CALM_S = 20.0  # until a node that is back has ended what it ran: it refuses a second copy of a job


@dataclass
class Fault:
    """One fault and what it cost.

    Attributes:
        run: whose rank or node it took.
        kind: ``kill`` or ``node``.
        what: the process or the node.
        at: seconds since the epoch.
        in_jobs_s: time of that run inside jobs until then.
        recovery_s: time inside jobs from the fault to the end of the next step; None when the run
            made none any more.
    """

    run: str
    kind: str
    what: str
    at: float
    in_jobs_s: float
    recovery_s: float | None = None


@dataclass
class Punisher:
    """Watches a pipeline's jobs and disturbs them.

    Attributes:
        cluster: where it runs.
        folder: the pipeline's.
        draw: the random numbers.
        per_minute: faults a minute inside jobs, 0 for none.
        node_share: of faults that take a node.
        max_faults: none after so many; two runs struck at once may make it one more.
        in_jobs_s: time inside jobs by run.
        faults: so far.
    """

    cluster: Cluster
    folder: Path
    draw: random.Random
    per_minute: float
    node_share: float
    max_faults: int
    in_jobs_s: dict[str, float] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    _cut: dict[str, float] = field(default_factory=dict)
    _due: float = 0.0
    _calm_from: float = 0.0

    def watch(self, timeout_s: float) -> None:
        """Disturb until all steps are done.

        Raises:
            RuntimeError: a step failed, Slurm gave a job up, or the time is over.
        """
        begun = last = time.monotonic()
        self._schedule()
        for states in self._poll(begun + timeout_s):
            now = time.monotonic()
            jobs = self._running_jobs()
            busy = {n: s for n, s in states.items() if s.kind == "run" and str(s.job) in jobs}
            for name in busy:
                self.in_jobs_s[name] = self.in_jobs_s.get(name, 0.0) + now - last
            last = now
            self._repair()
            self._note_recoveries()
            may_strike = len(self.faults) < self.max_faults
            if may_strike and sum(self.in_jobs_s.values()) >= self._due:
                struck = [n for n in busy if self._strike(n, Path(busy[n].folder), jobs)]
                if struck:
                    self._schedule()

    def _poll(self, deadline: float) -> Iterator[dict[str, StepState]]:
        while True:
            states = read_states(self.folder)
            yield states
            if all(step.state == "done" for step in states.values()):
                return
            lost = {n: s.reason for n, s in states.items() if s.state in ("failed", "held")}
            if lost or time.monotonic() > deadline:
                raise RuntimeError(f"not finished: {lost or states}")
            if time.monotonic() > self._calm_from:
                for step in states.values():
                    if step.state in ("submitted", "running"):
                        hurry(step)
            time.sleep(POLL_S)

    def _schedule(self) -> None:
        gap = self.draw.expovariate(self.per_minute / 60) if self.per_minute else float("inf")
        self._due = sum(self.in_jobs_s.values()) + gap

    def _running_jobs(self) -> dict[str, str]:
        """Return the nodes of every job that holds some."""
        lines = self.cluster.call("squeue", "-h", "-o", "%A %T %N %r").splitlines()
        if held := [line for line in lines if line.endswith(" held")]:
            raise RuntimeError(f"Slurm holds a job for a person to look at: {held}")
        words = [line.split()[:3] for line in lines]
        return {w[0]: w[2] for w in words if len(w) == 3 and w[1] in (*LIVING, ENDING)}

    def _strike(self, name: str, run: Path, jobs: dict[str, str]) -> bool:
        """Let a run have a fault if it has ranks just now."""
        ranks = ranks_of(self.cluster, run)
        held = self.cluster.call("scontrol", "show", "hostnames", jobs[self._job(run)]).split()
        ranks = {node: pids for node, pids in ranks.items() if node in held}
        if not ranks:
            return False
        node = self.draw.choice(sorted(ranks))
        kind = "node" if self.draw.random() < self.node_share else "kill"
        what = node if kind == "node" else f"{self.draw.choice(ranks[node])} on {node}"
        self.faults.append(Fault(name, kind, what, time.time(), self.in_jobs_s[name]))
        print(f"{len(self.faults)}: {kind} {what}, {name}", flush=True)
        if kind == "node":
            self.cluster.cut(node)
            self._cut[node] = time.monotonic() + OUTAGE_S
        else:
            end_processes([int(what.split()[0])])
        return True

    def _job(self, run: Path) -> str:
        return str(read_states(self.folder)[run.name].job)

    def _repair(self) -> None:
        """Plug nodes in again whose outage is over."""
        for node in [n for n, until in self._cut.items() if time.monotonic() > until]:
            del self._cut[node]
            self.cluster.plug_in(node)
            self._calm_from = time.monotonic() + CALM_S

    def _note_recoveries(self) -> None:
        for fault in self.faults:
            if fault.recovery_s is None and newest_record(self.folder / fault.run) > fault.at:
                fault.recovery_s = self.in_jobs_s[fault.run] - fault.in_jobs_s


def newest_record(run: Path) -> float:
    """Return when a run's last step was recorded, in seconds since the epoch; 0 for never."""
    return max((read_time(r["time"]) or 0.0 for r in journal(run, "train")[-1:]), default=0.0)
