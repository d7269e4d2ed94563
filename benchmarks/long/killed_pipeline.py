"""A pipeline on a Slurm cluster, each run killed once at a random step, against one unbroken.

    OMP_NUM_THREADS=1 python benchmarks/long/killed_pipeline.py --out /shared/folder --cluster \
        cluster=local_slurm cluster.nodes=2 cluster.gpus_per_node=1 cluster.site.cpus_per_gpu=1

First the pipeline here, undisturbed, then its graph of jobs on the cluster that ``sbatch`` leads
to. In each run a step of its first half is drawn; when the journal shows it, all ranks get SIGKILL,
the job starts them again. Compared are the last losses of every run and the weights of every
export, bit by bit; both need the same ranks with the same number of threads each, which decides the
last bits of sums. Prints a table and ends with a line of JSON; exit code 1 when something differs.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from launch.graph.state import StepState, read_states  # noqa: E402
from launch.json_file import read_json  # noqa: E402
from trainer.lives import read_lives  # noqa: E402

POLL_S = 0.1
REVOKED_S = 3  # nodes refuse a job whose credential is not newer than the one just revoked
EVERY_STEP = ["loop.log_every=1", "loop.save_every=1"]  # so that a kill costs little
FIGURES = ("loss", "accuracy", "margin", "reward", "kl")


def main() -> int:
    """Run both, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pipeline", default="demo")
    parser.add_argument("--out", type=Path, required=True, help="on a file system that nodes share")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of both")
    parser.add_argument("--cluster", nargs="*", default=["cluster=local_slurm"], help="of the jobs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout-s", type=float, default=3600)
    options = parser.parse_args()
    words = [f"pipeline={options.pipeline}", *EVERY_STEP, *options.set]
    out, begun = options.out.absolute(), time.monotonic()
    kuroshio("run", *words, f"dir={out}/unbroken")
    middle = time.monotonic()
    kuroshio("submit", *words, f"dir={out}/killed", *options.cluster)
    kills = disturb(out / "killed", random.Random(options.seed), options.timeout_s)
    seconds = {"unbroken": middle - begun, "killed": time.monotonic() - middle}
    steps = read_states(out / "killed")
    rows = {name: compare(out, name, step) for name, step in steps.items()}
    show(rows, kills)
    print(json.dumps({"seconds": seconds, "kills": kills, "steps": rows}))
    return 0 if all(row["equal"] for row in rows.values()) else 1


def kuroshio(*words: str) -> None:
    """Run one command; its failure ends the script."""
    print(f"$ kuroshio {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "launch", *words], check=True, cwd=ROOT)


def disturb(folder: Path, draw: random.Random, timeout_s: float) -> dict[str, int]:
    """Kill every run once, until all steps are done; return the step after which each was killed.

    Raises:
        RuntimeError: a step failed, or the time is over.
    """
    kills: dict[str, int] = {}
    targets: dict[str, int] = {}
    deadline = time.monotonic() + timeout_s
    while True:
        states = read_states(folder)
        if all(step.state == "done" for step in states.values()):
            return kills
        lost = {name: step.reason for name, step in states.items() if step.state == "failed"}
        if lost or time.monotonic() > deadline:
            raise RuntimeError(f"not finished: {lost or states}")
        for name, step in states.items():
            if step.kind == "run" and step.state in ("submitted", "running"):
                hurry(step)
                due = name not in kills and is_due(Path(step.folder), name, targets, draw)
                if due and kill_ranks(str(step.job)):
                    kills[name] = targets[name]
        time.sleep(POLL_S)


def kill_ranks(job: str) -> bool:
    """Send SIGKILL to the step of a job that runs now; sent to the job, it would cancel that.

    Returns:
        Whether there was one that Slurm could kill.
    """
    command = ["squeue", "--noheader", "--steps", f"--jobs={job}", "--format=%i %j"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    # Not the step that makes a folder on every node: without it the job could not go on.
    found = [line.split()[0] for line in lines if line.split()[1:] == ["python"]]
    if not found:
        return False
    return subprocess.run(["scancel", "--signal=KILL", found[-1]], check=False).returncode == 0


def is_due(run: Path, name: str, targets: dict[str, int], draw: random.Random) -> bool:
    """Say whether a run has come to the step after which it is to be killed."""
    values = read_json(run.parent / "steps" / f"{name}.json") or {}
    if (
        values["stage"] == "vocab"
    ):  # has no steps, and is soon over: as soon as its process is there
        targets[name] = 0
        return True
    if not any("started" in life for life in read_lives(run)):
        return False
    if name not in targets:
        targets[name] = draw.randint(1, max(1, max_steps(run) // 2))  # well before its end
    return any(record["step"] >= targets[name] for record in journal(run, "train"))


def max_steps(run: Path) -> int:
    """Return the length of a run, as its first life settled it."""
    import yaml

    return int(yaml.safe_load((run / "config.yaml").read_text())["loop"]["max_steps"])


def hurry(step: StepState) -> None:
    """Let a requeued job wait for seconds; by itself Slurm waits for minutes."""
    command = ["scontrol", "--oneliner", "show", "job", str(step.job)]
    shown = subprocess.run(command, capture_output=True, text=True).stdout
    begin = re.search(r"JobState=PENDING Reason=BeginTime .*EligibleTime=(\S+)", shown)
    soon = datetime.now() + timedelta(seconds=REVOKED_S + 1)
    if begin and datetime.fromisoformat(begin[1]) > soon:
        when = f"starttime=now+{REVOKED_S}"
        subprocess.run(["scontrol", "update", f"jobid={step.job}", when], check=False)


def journal(run: Path, split: str) -> list[dict[str, Any]]:
    """Return the records of one kind in a run's metrics."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(True) if line[-1] == "\n"]
    return [record for record in map(json.loads, whole) if record.get("split") == split]


def compare(
    out: Path, name: str, step: StepState, sides: tuple[str, str] = ("unbroken", "killed")
) -> dict[str, Any]:
    """Return a step's last figures in both pipelines and whether they are equal to the last bit."""
    read = last_figures if step.kind == "run" else identity
    both = [read(out / side / name) for side in sides]
    lives = sum("started" in life for life in read_lives(out / sides[1] / name))
    return {"equal": both[0] == both[1], "unbroken": both[0], "killed": both[1], "lives": lives}


def last_figures(run: Path) -> dict[str, Any]:
    """Return what the last training step and the last evaluation of a run measured."""
    figures: dict[str, Any] = {}
    for split in ("train", "eval"):
        records = journal(run, split)
        if records:
            last = records[-1]
            figures[split] = last.get("sources") or {k: last[k] for k in FIGURES if k in last}
            figures[f"{split} step"] = last["step"]
    if (run / "model" / "kuroshio.json").is_file():
        figures |= identity(run / "model")
    return figures


def identity(folder: Path) -> dict[str, Any]:
    """Return what tells a tokenizer's or a model's folder from another one."""
    pair = read_json(folder / "kuroshio.json")
    if pair is None:
        return {"tokenizer": (folder / "tokenizer.json").read_text(encoding="utf-8").__hash__()}
    return {key: pair[key] for key in ("tokenizer_fingerprint", "model_identity")}


def show(rows: dict[str, dict[str, Any]], kills: dict[str, int]) -> None:
    """Print a line for every step."""
    print("\n| step | killed after | lives | unbroken | killed | equal |")
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        last = [row[side].get("train", {}) for side in ("unbroken", "killed")]
        shown = [
            next((f"{key} {each[key]}" for key in FIGURES if key in each), "") for each in last
        ]
        print(
            f"| {name} | {kills.get(name, '')} | {row['lives']} | {shown[0]} | {shown[1]} "
            f"| {'yes' if row['equal'] else 'NO'} |"
        )


if __name__ == "__main__":
    sys.exit(main())
