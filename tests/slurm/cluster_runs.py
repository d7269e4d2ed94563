"""Runs of a micro model on the cluster, undisturbed or disturbed at a known place."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from cluster_nodes import command_line

from launch import sbatch, submission

BRAKE = Path(__file__).with_name("brake") / "sitecustomize.py"
SITE = {"name": "local_slurm", "scheduler": "slurm", "gpus_per_node": 0, "gres": "gpu:{n}"}
TIMEOUT_S = 600


class Runs:
    """Submits runs, and looks at what they left."""

    def __init__(self, cluster: Cluster, config: dict[str, Any]) -> None:
        self.cluster, self.config = cluster, config

    def values(self, run_dir: Path, **more: Any) -> dict[str, Any]:
        """Return a run of two nodes with a rank each under ZeRO-2; set more of ``cluster``."""
        values = copy.deepcopy(self.config)
        values["run_dir"] = str(run_dir)
        values["engine"] = {"zero_stage": 2, "precision": "fp32"}
        values["loop"] |= {"max_steps": 16, "save_every": 5, "log_every": 1}
        values["cluster"] = {
            "nodes": 2, "gpus_per_node": 1, "partition": "gtest", "account": "MST109001",
            "site": dict(SITE), "timeout_s": 60, **more,
        }  # fmt: skip
        return values

    def submit(self, values: dict[str, Any], **brake: Any) -> str:
        """Submit a run with the code of this checkout, disturbed by ``brake`` (see there)."""
        run_dir = Path(values["run_dir"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(self.cluster.config_path))
            hand_over = sbatch.submit_script

            def install_and_submit(script: Path) -> str:
                shutil.copy(BRAKE, run_dir / "code")
                (run_dir / "code" / "brake.json").write_text(json.dumps(brake))
                return hand_over(script)

            patch.setattr(sbatch, "submit_script", install_and_submit if brake else hand_over)
            return submission.submit_run(values, run_dir)

    def submit_until(self, step: int, values: dict[str, Any], **brake: Any) -> str:
        """Submit a run as ``submit`` does, and wait for its journal to show a step."""
        job = self.submit(values, **brake)
        wait_until(lambda: read_step(Path(values["run_dir"])) >= step, f"step {step}")
        return job

    def ranks(self, run_dir: Path) -> dict[str, list[int]]:
        """Return the processes of a run's ranks on each node; "" is all nodes in one."""
        return ranks_of(self.cluster, run_dir)


def ranks_of(cluster: Cluster, run_dir: Path) -> dict[str, list[int]]:
    """Return the processes of a run's ranks on each node; "" is all nodes in one."""
    word = f"run --config {run_dir}/config.yaml"
    nodes = {name: machine.processes() for name, machine in cluster.machines.items()}
    nodes = nodes or {"": cluster.processes()}
    found = {name: [pid for pid in pids if _is_rank(pid, word)] for name, pids in nodes.items()}
    return {name: pids for name, pids in found.items() if pids}


def _is_rank(pid: int, word: str) -> bool:
    words = command_line(pid)
    return word in words and "srun" not in words.split()[0]


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = TIMEOUT_S) -> None:
    """Wait until a condition holds; fail, naming it, when it does not."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.1)


def read_step(run_dir: Path) -> int:
    """Return the newest step in a run's metrics."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def identify_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of every file in a folder by its path: both tell who wrote it."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: (path.stat().st_ino, path.stat().st_mtime_ns) for name, path in files.items()}
