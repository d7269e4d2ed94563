"""Seconds from the command to the end of the first step of a 58 M LLaMA with prepared data.

    python benchmarks/startup.py                     # 1 and 2 ranks; 2 minutes on 2 cores
    python benchmarks/startup.py --ranks 1 --overrides engine=zero0 engine.precision=fp32

The command is ``python -m launch run`` as a user types it, into a new run folder, with a step of
1,024 tokens. The journal's time stamps say when set-up and first step ended. What the parts cost
is found by commands that do less: ``--help`` (the interpreter), importing the stage, and
``--dry-run`` (imports, composition, checks). Wall seconds, and processor seconds of all processes
together, which a busy machine disturbs less; medians of the repeats. Prints a table, then one line
of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.inputs.run_inputs import find_tokenizer, overrides  # noqa: E402

POLL_S = 0.05
TIMEOUT_S = 600.0
Seconds = tuple[float, float]  # of wall time, of processor time


def main() -> None:
    """Measure the parts, then the whole with each number of ranks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path, help="its size decides the model's rows")
    parser.add_argument("--overrides", nargs="*", default=[], help="added to the command")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = overrides(find_tokenizer(args.tokenizer, folder), folder)
        words += ["loop.micro_batch_size=1", "loop.global_batch_tokens=1024", *args.overrides]
        clock([*LAUNCH, "prepare", *words])
        print(f"load average {os.getloadavg()[0]:.1f}; wall and processor seconds")
        run = [*LAUNCH, "run", *words, f"run_dir='{folder}/dry'"]
        result: dict[str, Any] = {
            "benchmark": "startup",
            "load_average": os.getloadavg()[0],
            "help": show(
                "kuroshio --help", [clock([*LAUNCH, "--help"]) for _ in range(args.repeats)]
            ),
            "imports": show("importing the stage", [clock(IMPORT) for _ in range(args.repeats)]),
            "dry_run": show(
                "run --dry-run", [clock([*run, "--dry-run"]) for _ in range(args.repeats)]
            ),
        }
        for num_ranks in args.ranks:
            result[f"ranks_{num_ranks}"] = measure(words, num_ranks, args.repeats, folder)
    print(json.dumps(result))


LAUNCH = [sys.executable, "-m", "launch"]
IMPORT = [sys.executable, "-c", "import trainer.stages.pretrain"]


def measure(words: list[str], num_ranks: int, repeats: int, folder: Path) -> dict[str, Seconds]:
    """Start runs of ``num_ranks``; return the seconds to the ends of set-up and first step."""
    runs = [start(words, num_ranks, folder / f"{num_ranks}_{i}") for i in range(repeats)]
    return {
        part: show(f"{num_ranks} ranks to the end of {part}", [run[part] for run in runs])
        for part in runs[0]
    }


def start(words: list[str], num_ranks: int, run_dir: Path) -> dict[str, Seconds]:
    """Run the command until its journal holds a step, then end its processes."""
    command = [*LAUNCH, "run", *words, f"run_dir='{run_dir}'", f"cluster.gpus_per_node={num_ranks}"]
    log = run_dir.with_suffix(".log")
    began, seconds = time.time(), {}
    with log.open("w") as output:
        process = psutil.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    try:
        while "first step" not in seconds:
            time.sleep(POLL_S)
            if process.poll() is not None or time.time() > began + TIMEOUT_S:
                raise SystemExit(f"{' '.join(command)} took no step:\n{log.read_text()}")
            for record in read_journal(run_dir):
                part = "first step" if record["split"] == "train" else "set-up"
                if part not in seconds:
                    seconds[part] = (record["time"] - began, processor_seconds(process))
    finally:
        end(process)
    return seconds


def end(process: psutil.Popen) -> None:
    """Kill a process and its descendants, which would save before they leave."""
    if process.poll() is None:
        for one in [*process.children(recursive=True), process]:
            one.kill()
        process.wait()


def read_journal(run_dir: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a run's journal; none before there is one."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def processor_seconds(process: psutil.Process) -> float:
    """Return the processor time so far of a process and its descendants, ended ones included."""
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        times = one.cpu_times()
        total += times.user + times.system + times.children_user + times.children_system
    return total


def clock(command: list[str]) -> Seconds:
    """Return the wall and processor seconds of a command that must succeed."""
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return time.perf_counter() - began, processor


def show(what: str, runs: list[Seconds]) -> Seconds:
    """Print and return the medians of wall and processor seconds."""
    wall, processor = (statistics.median(column) for column in zip(*runs, strict=True))
    print(f"{what:36} {wall:6.2f} {processor:6.2f}", flush=True)
    return wall, processor


if __name__ == "__main__":
    main()
