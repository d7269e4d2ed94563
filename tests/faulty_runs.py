"""Start `kuroshio run` with faults in it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 240


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        code: of ``kuroshio run``.
        output: of the terminal.
        still_s: between its last record and its end.
    """

    code: int
    output: str
    still_s: float


def run_with_fault(values: dict[str, Any], num_ranks: int, fault: str, **cluster: Any) -> Ended:
    """Run a config on ``num_ranks`` processes of this machine that fail as ``fault`` says."""
    values["cluster"] = {**values["cluster"], "gpus_per_node": num_ranks, **cluster}
    run_dir = Path(values["run_dir"])
    path = run_dir.with_suffix(".yaml")
    path.write_text(json.dumps(values))
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "launch", "run", "--config", str(path)],
        env=environ | {"KUROSHIO_FAULT": fault},
        cwd=ROOT,
        text=True,
        timeout=LIMIT_S,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    ended = time.time()
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return Ended(done.returncode, done.stdout, ended - json.loads(lines[-1])["time"])


def make_ppo(base: dict[str, Any]) -> dict[str, Any]:
    """Return a config of stage ppo on the prompts of a config of stage dpo."""
    values = copy.deepcopy(base)
    values["stage"] = {"name": "ppo", "rewards": {"contains": {"texts": ["a"]}}}
    values["stage"] |= {"rollouts_per_step": 4, "sampling": {"max_new_tokens": 8}}
    values["data"] |= {"content": "prompts", "max_length": 64}
    return values
