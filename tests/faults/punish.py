"""A pipeline on a Slurm cluster of this machine under random faults, against one undisturbed.

    OMP_NUM_THREADS=1 python tests/faults/punish.py --out DIR --seed 1

Faults come as a Poisson process in the time that runs spend inside jobs (``--per-minute``, one by
default) until there were ``--faults`` of them or ``--minutes`` are over; then the pipeline runs to
its end. A fault is SIGKILL of a random rank, or with ``--node-share`` the loss of one of its nodes:
the cable is unplugged, and plugged in again a minute later. Nobody intervenes; Slurm's wait
before a requeued job may start is cut to seconds, and counts as time outside of jobs. The
undisturbed pipeline (``DIR/undisturbed``, shared by all seeds) goes through the same jobs.

Effective training time is that of steps that count in the end, divided by the time inside jobs:
start, evaluation, saving, detection and lost steps are losses. Ends with a line of JSON; exit code
1 when any last loss or export differs in any bit from the undisturbed one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "slurm")]

from cluster import Cluster, running  # noqa: E402
from cluster_nodes import end_processes  # noqa: E402
from cluster_runs import ranks_of  # noqa: E402

from benchmarks.long.killed_pipeline import compare, hurry, journal, kuroshio  # noqa: E402
from launch.graph.state import StepState, read_states  # noqa: E402
from launch.slurm_queue import ENDING, LIVING  # noqa: E402
from trainer.lives import read_lives  # noqa: E402
from trainer.metrics.life import read_time  # noqa: E402

POLL_S = 0.2
OUTAGE_S = 60.0  # Slurm gives the node up after about 20
CALM_S = 20.0  # until a node that is back has ended what it ran: it refuses a second copy of a job
NUM_NODES = 3  # a lost one is replaced
# Young (1974): every sqrt(2 x cost of a save x time between faults) = sqrt(2 x 0.1 x 60) s.
DEFAULTS = ["engine.precision=fp32", "loop.log_every=1", "loop.save_every=5", "loop.keep_last=2"]
OF_DEMO = ["ppo.loop.save_every=1"]
PLACE = ["cluster=local_slurm", "cluster.account=MST109001", 'cluster.site.gres="gpu:{n}"']
PLACE += ["cluster.nodes=2", "cluster.gpus_per_node=1", "cluster.max_lives=99"]
# Bad luck in a row is no crash loop at such a rate; a second thread would decide the last bits.
PLACE += ["cluster.max_lives_without_progress=20", "cluster.site.cpus_per_gpu=1"]


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
        max_faults: how many at most.
        minutes: until when.
        in_jobs_s: time inside jobs by run.
        faults: so far.
    """

    cluster: Cluster
    folder: Path
    draw: random.Random
    per_minute: float
    node_share: float
    max_faults: int
    minutes: float
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
            is_over = len(self.faults) >= self.max_faults or now - begun > 60 * self.minutes
            if not is_over and sum(self.in_jobs_s.values()) >= self._due:
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


def account(run: Path) -> dict[str, float]:
    """Return of a finished run its steps, their seconds, how many were lost, and its lives."""
    rewinds = [r for r in journal(run, "event") if r.get("event") == "rewind"]
    steps = journal(run, "train")
    return {
        "steps": len(steps),
        "productive_s": sum(record["seconds"] for record in steps),
        "lost_steps": sum(record["last_step"] - record["step"] for record in rewinds),
        "lives": sum("started" in life for life in read_lives(run)),
    }


def summarise(punisher: Punisher) -> dict[str, Any]:
    """Return what the whole came to."""
    runs = {name: account(punisher.folder / name) for name in punisher.in_jobs_s}
    total = {key: sum(run[key] for run in runs.values()) for key in ("productive_s", "lost_steps")}
    in_jobs_s, faults = sum(punisher.in_jobs_s.values()), len(punisher.faults)
    recoveries = sorted(f.recovery_s for f in punisher.faults if f.recovery_s is not None)
    return {
        "in_jobs_s": round(in_jobs_s, 1),
        "productive_s": round(total["productive_s"], 1),
        "effective_share": round(total["productive_s"] / in_jobs_s, 4),
        "faults": faults,
        "node_losses": sum(fault.kind == "node" for fault in punisher.faults),
        "lives": sum(run["lives"] for run in runs.values()),
        "lost_steps": total["lost_steps"],
        "lost_steps_per_fault": round(total["lost_steps"] / faults, 2) if faults else None,
        "median_recovery_s": round(recoveries[len(recoveries) // 2], 1) if recoveries else None,
        "runs": {n: run | {"in_jobs_s": punisher.in_jobs_s[n]} for n, run in runs.items()},
    }


def main() -> int:
    """Run both, compare, print."""
    options = parse()
    os.environ["OMP_NUM_THREADS"] = "1"
    out = options.out.absolute()
    own = OF_DEMO * (options.pipeline == "demo")
    words = [f"pipeline={options.pipeline}", *DEFAULTS, *own, *options.set]

    def run(cluster: Cluster, name: str, per_minute: float) -> Punisher:
        kuroshio("submit", *words, f"dir={out}/{name}", *PLACE)
        limits = (options.node_share, options.faults, options.minutes)
        draw = random.Random(options.seed)
        punisher = Punisher(cluster, out / name, draw, per_minute, *limits)
        punisher.watch(options.timeout_s)
        return punisher

    with tempfile.TemporaryDirectory() as folder, running(Path(folder) / "c", NUM_NODES) as cluster:
        os.environ["SLURM_CONF"] = str(cluster.config_path)
        record = out / "undisturbed.json"
        if not record.exists():
            record.write_text(json.dumps(summarise(run(cluster, "undisturbed", 0.0))))
        name = f"seed_{options.seed}"
        punished = run(cluster, name, options.per_minute)
    result = report(out, name, punished, json.loads(record.read_text()))
    print(json.dumps(result))
    return 0 if result["equal"] else 1


def report(out: Path, name: str, punisher: Punisher, undisturbed: dict[str, Any]) -> dict[str, Any]:
    """Print a line for every run and for the whole; return the figures of both pipelines."""
    steps = read_states(out / name)
    equal = {n: compare(out, n, s, ("undisturbed", name))["equal"] for n, s in steps.items()}
    figures = summarise(punisher)
    print("\n| run | steps | lives | lost steps | in jobs, s | effective | undisturbed | equal |")
    print("|---|---|---|---|---|---|---|---|")
    for run, found in {**figures["runs"], "all": figures}.items():
        before = undisturbed["runs"].get(run, undisturbed)
        shares = [f"{each['productive_s'] / each['in_jobs_s']:.1%}" for each in (found, before)]
        same = equal[run] if run in equal else all(equal.values())
        print(
            f"| {run} | {found.get('steps', '')} | {found['lives']} | {found['lost_steps']} "
            f"| {found['in_jobs_s']:.0f} | {shares[0]} | {shares[1]} | {'yes' if same else 'NO'} |"
        )
    faults = [asdict(fault) for fault in punisher.faults]
    return {
        "seed_folder": name,
        "equal": all(equal.values()),
        "punished": figures,
        "undisturbed": undisturbed,
        "steps_equal": equal,
        "faults": faults,
    }


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where both pipelines go")
    parser.add_argument("--pipeline", default="demo")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of both")
    parser.add_argument("--seed", type=int, default=1, help="of the faults")
    parser.add_argument("--per-minute", type=float, default=1.0, help="faults, inside jobs")
    parser.add_argument("--node-share", type=float, default=0.2, help="of faults that take a node")
    parser.add_argument("--faults", type=int, default=25, help="at most")
    parser.add_argument("--minutes", type=float, default=20.0, help="no fault after that")
    parser.add_argument("--timeout-s", type=float, default=7200.0, help="of each pipeline")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
