"""Benchmarks whose ranks are processes of their own: rank 0 reports one line of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.inputs.run_inputs import overrides, place_of_ranks

if TYPE_CHECKING:
    import torch

    from trainer.engine.engine import Engine

RESULT = "result "  # begins the line in which rank 0 reports


def run_ranks(script: str, num_ranks: int, case: dict[str, Any], name: str) -> dict[str, Any]:
    """Run ``script --rank CASE`` once for each rank; return what rank 0 reported.

    Args:
        script: file of the benchmark.
        num_ranks: number of processes.
        case: what is measured, as JSON.
        name: of the case, for a message.
    """
    command = [sys.executable, script, "--rank", json.dumps(case)]
    environ = os.environ | place_of_ranks(num_ranks)
    ranks = [
        subprocess.Popen(
            command,
            env=environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    outputs = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise SystemExit(f"{name}: a rank failed")
    line = next(line for line in outputs[0].splitlines() if line.startswith(RESULT))
    return json.loads(line.removeprefix(RESULT))


def start_rank(values: dict[str, Any], tokenizer: str) -> tuple[Engine, torch.device]:
    """Join the other ranks and build the engine of a composed configuration."""
    from tokenizer.load import load_tokenizer
    from trainer.config import load_config
    from trainer.engine.engine import init_distributed
    from trainer.policy import build_policy
    from trainer.stage import Context

    config = load_config(values)
    places = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    rank, world_size, local_rank = places
    device = init_distributed(local_rank, config.cluster.timeout_s)
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    context = Context(config, Path(config.run_dir), rank, world_size, local_rank)
    engine, _ = build_policy(context, load_tokenizer(tokenizer))
    return engine, device


def report(rank: int, result: dict[str, Any]) -> None:
    """Print the result on rank 0 and leave, as ranks leave."""
    from launch.__main__ import leave
    from trainer.engine.collectives import barrier

    if rank == 0:
        print(RESULT + json.dumps(result), flush=True)
    barrier()
    leave(0)


def compose_case(
    engine: str, precision: str, tokenizer: Path, folder: Path, extra: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the configuration of a case that writes into ``folder``."""
    from launch.compose import compose_values

    return compose_values(
        [
            *overrides(tokenizer, folder),
            f"engine={engine}",
            f"engine.precision={precision}",
            f"run_dir='{folder / 'run'}'",
            *extra,
        ]
    )
