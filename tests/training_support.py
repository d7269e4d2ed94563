"""Run training scenarios in processes of their own and read what they left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from launch.rendezvous import free_port
from trainer.engine.committed import Checkpoint, Reader, iterate_whole, list_steps

ROOT = Path(__file__).resolve().parents[1]


def run_scenarios(
    scenarios: list[dict[str, Any]],
    num_ranks: int,
    folder: Path,
    timeout_s: int = 420,
    script: Path = ROOT / "tests/scenarios.py",
) -> subprocess.CompletedProcess[str]:
    """Run scenarios on ``num_ranks`` processes; all are ended as soon as one fails."""
    path = folder / f"scenarios_{len(list(folder.glob('scenarios_*')))}.json"
    path.write_text(json.dumps(scenarios))
    port = str(free_port())
    command = [sys.executable, str(script), str(path)]
    logs = [path.with_suffix(f".{rank}.log") for rank in range(num_ranks)]
    ranks = []
    for rank, log in enumerate(logs):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_PORT": port}
        environ = {**os.environ, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        environ |= {"PYTHONFAULTHANDLER": "1"}
        environ |= {k: str(v) for k, v in place.items()} | {"PYTHONPATH": str(ROOT)}
        with log.open("w") as file:
            ranks.append(subprocess.Popen(command, env=environ, stdout=file, stderr=file))
    code = end_together(ranks, timeout_s)
    output = "\n".join(f"--- rank {i}\n{log.read_text()}" for i, log in enumerate(logs))
    return subprocess.CompletedProcess(command, code, output, "")


def run_chains(chains: list[list[dict[str, Any]]], folder: Path, timeout_s: int = 400) -> list[str]:
    """Run lives of runs, chains of which may go on at once (see ``forked_ranks.py``).

    Returns:
        What went otherwise than it was to, with the ranks' logs; empty if nothing did.
    """
    folder = folder / f"chains_{len(list(folder.glob('chains_*')))}"
    folder.mkdir(parents=True)
    path = folder / "chains.json"
    path.write_text(json.dumps(chains))
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    command = [sys.executable, str(ROOT / "tests/forked_ranks.py"), str(path)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode:
        return [done.stdout + done.stderr]
    problems = []
    for number, codes in enumerate(json.loads(path.with_suffix(".codes").read_text())):
        wanted = [life["code"] for life in chains[number]]
        if codes != wanted:
            logs = sorted(folder.glob(f"chain_{number}_life_{len(codes) - 1}.*.log"))
            texts = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs)
            problems.append(f"chain {number}: ended with {codes} instead of {wanted}\n{texts}")
    return problems


def end_together(ranks: list[subprocess.Popen[bytes]], timeout_s: float) -> int:
    """Wait for all ranks; return 0, or the code of one that failed.

    A rank whose peer was killed is killed as well: it may hang in its teardown. One that is silent
    for ``timeout_s``, or a minute longer than a rank that failed, leaves its stacks in its log.
    """
    limit = time.monotonic() + timeout_s
    try:
        while time.monotonic() < limit:
            codes = [process.poll() for process in ranks]
            if -signal.SIGKILL in codes:
                return -signal.SIGKILL
            if None not in codes:
                return next(filter(None, codes), 0)
            if any(codes):
                limit = min(limit, time.monotonic() + 60)
            time.sleep(0.05)
        for process in ranks:
            process.send_signal(signal.SIGABRT)
            process.wait(60)
        return next(filter(None, (process.returncode for process in ranks)))
    finally:
        for process in ranks:
            process.kill()
            process.wait(60)


def read_masters(run_dir: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """Return the fp32 weights of a run's checkpoint at ``step`` (default: the newest)."""
    steps = list_steps(run_dir / "checkpoints")
    path = steps[0] if step is None else run_dir / "checkpoints" / f"step_{step:08d}"
    manifest = json.loads((path / "manifest.json").read_text())
    return dict(iterate_whole(Reader(Checkpoint(path, manifest))))


def read_losses(run_dir: Path) -> dict[int, float]:
    """Return the logged training loss by step."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {r["step"]: r["loss"] for r in records if r["split"] == "train" and "loss" in r}


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Return the largest absolute difference of two sets of weights with equal names."""
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)
