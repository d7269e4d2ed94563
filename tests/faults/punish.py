"""A pipeline on a Slurm cluster of this machine under random faults, against one undisturbed.

    OMP_NUM_THREADS=1 python tests/faults/punish.py --out DIR --seed 1

Faults come as a Poisson process in the time that runs spend inside jobs (``--per-minute``, one by
default). The pipeline runs again and again from its beginning until there were ``--faults`` of
them or ``--minutes`` are over; the round under way runs to its end. A fault is SIGKILL of a random
rank, or with ``--node-share`` the loss of one of its nodes: the cable is unplugged, and plugged in
again a minute later. Where two runs are under way, each has its own at that moment and both count.
Nobody intervenes; Slurm's wait before a requeued job may start is cut to seconds, and counts as
time outside of jobs. The undisturbed pipeline (``DIR/undisturbed``, shared by all seeds) goes
through the same jobs.

Effective training time is that of steps that count in the end, divided by the time inside jobs:
start, evaluation, saving, detection and lost steps are losses. Ends with a line of JSON; exit code
1 when any last loss or export of any round differs in any bit from the undisturbed one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "slurm")]

from cluster import Cluster, running  # noqa: E402
from punisher import Fault, Punisher  # noqa: E402

from benchmarks.long.killed_pipeline import compare, journal, kuroshio  # noqa: E402
from launch.graph.state import read_states  # noqa: E402
from trainer.lives import read_lives  # noqa: E402

NUM_NODES = 3  # a lost one is replaced
# Young (1974): every sqrt(2 x cost of a save x time between faults) = sqrt(2 x 0.1 x 60) s.
DEFAULTS = ["engine.precision=fp32", "loop.log_every=1", "loop.save_every=5", "loop.keep_last=2"]
OF_DEMO = ["ppo.loop.save_every=1"]
PLACE = ["cluster=local_slurm", "cluster.account=MST109001", 'cluster.site.gres="gpu:{n}"']
PLACE += ["cluster.nodes=2", "cluster.gpus_per_node=1", "cluster.max_lives=99"]
# Bad luck in a row is no crash loop at such a rate; a second thread would decide the last bits.
PLACE += ["cluster.max_lives_without_progress=20", "cluster.site.cpus_per_gpu=1"]


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


def summarise(rounds: Sequence[Punisher]) -> dict[str, Any]:
    """Return what all rounds together came to."""
    runs: dict[str, dict[str, float]] = {}
    for punisher in rounds:
        for name, in_jobs_s in punisher.in_jobs_s.items():
            found = account(punisher.folder / name) | {"in_jobs_s": in_jobs_s}
            runs[name] = {k: v + runs.get(name, {}).get(k, 0) for k, v in found.items()}
    totals = ("in_jobs_s", "productive_s", "lives", "lost_steps")
    total = {key: sum(run[key] for run in runs.values()) for key in totals}
    faults = [fault for punisher in rounds for fault in punisher.faults]
    return {
        "rounds": len(rounds),
        "in_jobs_s": round(total["in_jobs_s"], 1),
        "productive_s": round(total["productive_s"], 1),
        "effective_share": round(total["productive_s"] / total["in_jobs_s"], 4),
        "faults": len(faults),
        "node_losses": sum(fault.kind == "node" for fault in faults),
        "lives": total["lives"],
        "lost_steps": total["lost_steps"],
        "lost_steps_per_fault": round(total["lost_steps"] / len(faults), 2) if faults else None,
        "median_recovery_s": {kind: median_recovery(faults, kind) for kind in ("kill", "node")},
        "runs": runs,
    }


def median_recovery(faults: Sequence[Fault], kind: str) -> float | None:
    """Return the seconds inside jobs from a fault of a kind to the end of the next step."""
    found = [f.recovery_s for f in faults if f.kind == kind and f.recovery_s is not None]
    return round(statistics.median(found), 1) if found else None


def main() -> int:
    """Run both, compare, print."""
    options = parse()
    os.environ["OMP_NUM_THREADS"] = "1"
    out = options.out.absolute()
    own = OF_DEMO * (options.pipeline == "demo")
    words = [f"pipeline={options.pipeline}", *DEFAULTS, *own, *options.set]
    draw, record = random.Random(options.seed), out / "undisturbed.json"

    def run(cluster: Cluster, name: str, per_minute: float, max_faults: int) -> Punisher:
        if (out / name).exists():
            raise SystemExit(f"{out / name} is there already: remove it, or give another --out")
        kuroshio("submit", *words, f"dir={out}/{name}", *PLACE)
        punisher = Punisher(cluster, out / name, draw, per_minute, options.node_share, max_faults)
        punisher.watch(options.timeout_s)
        return punisher

    with tempfile.TemporaryDirectory() as folder, running(Path(folder) / "c", NUM_NODES) as cluster:
        os.environ["SLURM_CONF"] = str(cluster.config_path)
        if not record.exists():
            record.write_text(json.dumps(summarise([run(cluster, "undisturbed", 0.0, 0)])))
        undisturbed = json.loads(record.read_text())
        rounds: list[Punisher] = []
        left, ends_at = options.faults, time.monotonic() + 60 * options.minutes
        while not rounds or (left > 0 and time.monotonic() < ends_at):
            name = f"seed_{options.seed}_{len(rounds) + 1}"
            rounds.append(run(cluster, name, options.per_minute, left))
            left -= len(rounds[-1].faults)
            print(json.dumps({"round": name} | summarise(rounds[-1:])), flush=True)
    result = report(rounds, undisturbed)
    print(json.dumps(result))
    return 0 if result["equal"] else 1


def report(rounds: Sequence[Punisher], undisturbed: dict[str, Any]) -> dict[str, Any]:
    """Print a line for every run and for the whole; return the figures of all pipelines."""
    equal: dict[str, bool] = {}
    for punisher in rounds:
        out, name = punisher.folder.parent, punisher.folder.name
        for step, state in read_states(punisher.folder).items():
            same = compare(out, step, state, ("undisturbed", name))["equal"]
            equal[step] = equal.get(step, True) and same
    figures = summarise(rounds)
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
    return {
        "equal": all(equal.values()),
        "punished": figures,
        "undisturbed": undisturbed,
        # How much longer the jobs took than those of as many undisturbed pipelines.
        "time_in_jobs_ratio": round(
            figures["in_jobs_s"] / (len(rounds) * undisturbed["in_jobs_s"]), 3
        ),
        "steps_equal": equal,
        "faults": [asdict(fault) for punisher in rounds for fault in punisher.faults],
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
    parser.add_argument("--faults", type=int, default=25, help="none after so many")
    parser.add_argument("--minutes", type=float, default=20.0, help="no further round after that")
    parser.add_argument("--timeout-s", type=float, default=7200.0, help="of each pipeline")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
