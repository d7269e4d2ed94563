"""Runs of a stage that exists for tests only: what to say on the command line, what it left.

The stage (``launch/probe/``) is given to interpreters by a ``sitecustomize`` on PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from launch.help import CONF
from launch.rendezvous import free_port

ROOT = Path(__file__).resolve().parents[1]
PROBE = ROOT / "tests" / "launch" / "probe"
SCRIPTS = Path(sys.executable).parent
RUN = [sys.executable, "-m", "launch", "run"]
TIMEOUT_S = 300  # the first run on a machine may compile an op of DeepSpeed


def words(run_dir: Path, *more: str, num_ranks: int = 2) -> list[str]:
    """Return the overrides of a probe run: the default stage's fields make place for its own."""
    text = (CONF / "stage" / "pretrain.yaml").read_text(encoding="utf-8")
    fields = [f"~stage.{key}" for key in yaml.safe_load(text)["stage"] if key != "name"]
    stage = ["stage.name=probe", *fields]
    return [*stage, f"run_dir={run_dir}", f"cluster.gpus_per_node={num_ranks}", *more]


def environment(**more: str) -> dict[str, str]:
    """Return the environment in which interpreters know the stage."""
    environ = {**os.environ, "PYTHONPATH": f"{PROBE}:{ROOT}", "OMP_NUM_THREADS": "1", **more}
    environ["PATH"] = f"{SCRIPTS}:{environ['PATH']}"
    return environ


def check_ranks(run_dir: Path, launcher: str, num_nodes: int = 1, per_node: int = 2) -> set[str]:
    """Check that all ranks saw each other, and what the run folder says; return where they met."""
    world_size, meetings = num_nodes * per_node, set()
    for rank in range(world_size):
        place = json.loads((run_dir / f"rank{rank}.json").read_text())
        total = world_size * (world_size - 1) / 2
        assert (place["rank"], place["world_size"], place["total"]) == (rank, world_size, total)
        local = (str(rank % per_node), str(per_node))
        assert (place["LOCAL_RANK"], place["LOCAL_WORLD_SIZE"]) == local
        assert place["mpi4py"] == (launcher == "mpi")
        meetings.add(place["MASTER_ADDR"])
    lives = [json.loads(line) for line in (run_dir / "lives.jsonl").read_text().splitlines()]
    starts = [life for life in lives if "started" in life]
    assert [(s["launcher"], s["world_size"]) for s in starts] == [(launcher, world_size)]
    return meetings


def by_hand(
    variables: Sequence[dict[str, str]], commands: Sequence[Sequence[str]]
) -> list[tuple[int, str]]:
    """Start one process for each environment and command; return exit codes and outputs."""
    processes = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
            env=environment(**own),
        )
        for own, command in zip(variables, commands, strict=True)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
        return [(p.returncode, out) for p, out in zip(processes, outputs, strict=True)]
    finally:
        for process in processes:
            process.kill()


def rank_variables(num_ranks: int = 2) -> list[dict[str, str]]:
    """Return the environment of each rank on this machine."""
    port = str(free_port())
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_ranks))
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]
