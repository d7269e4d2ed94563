"""Run folders as a run leaves them, and Slurm commands that answer what a test wants."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import yaml

from trainer.lease import Process

BOOT = Process("another boot", "pid:[1]", 7, 7)  # of a machine that is not this one


def iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(seconds))


class RunFolder:
    """Builds a run's folder file by file."""

    def __init__(self, path: Path, now: float, **config: Any) -> None:
        self.path, self.now = path, now
        path.mkdir(parents=True)
        values = {"name": "tuned", "stage": {"name": "sft"}, "loop": {"max_steps": 400}, **config}
        (path / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")

    def train(self, step: int, ago: float, **figures: Any) -> RunFolder:
        record = {"split": "train", "step": step, "time": self.now - ago, "loss": 1.2345,
                  "seconds": 2.0, "eta_s": 2.0 * (400 - step), "tokens_per_s": 12345.6}  # fmt: skip
        return self.write("metrics.jsonl", record | figures)

    def life(self, ago: float, **facts: Any) -> RunFolder:
        start = {"started": iso(self.now - ago), "token": 1, "host": "n1", "job": None,
                 "restart": 0, "launcher": "slurm", "world_size": 4}  # fmt: skip
        return self.write("lives.jsonl", start | facts)

    def end(self, ago: float, exit_code: int, **facts: Any) -> RunFolder:
        end = {"ended": iso(self.now - ago), "token": 1, "exit_code": exit_code}
        return self.write("lives.jsonl", end | facts)

    def save(self, step: int, ago: float = 0, evaluated: bool = True) -> RunFolder:
        folder = self.path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        manifest = folder / "manifest.json"
        manifest.write_text(json.dumps({"step": step, "state": {"evaluated": evaluated}}))
        os.utime(manifest, (self.now - ago, self.now - ago))
        return self

    def hold(self, ago: float, process: Process = BOOT, **facts: Any) -> RunFolder:
        """Write a lease whose last heartbeat is ``ago`` seconds old."""
        lease = {"token": 1, "host": "n1", "job": None, "restart": 0, "claimed": iso(self.now),
                 "process": vars(process)} | facts  # fmt: skip
        path = self.path / "leases" / f"{lease['token']:05d}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(lease))
        os.utime(path, (self.now - ago, self.now - ago))
        return self

    def submitted(self, *jobs: str, **facts: Any) -> RunFolder:
        record = {"job_ids": list(jobs), "cluster": "taiwania2", "plan": None, **facts}
        (self.path / "submit.json").write_text(json.dumps(record))
        return self

    def write(self, name: str, record: dict[str, Any]) -> RunFolder:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return self


def fake_commands(folder: Path, **outputs: str) -> Path:
    """Write commands that print what they are given and note how they were called.

    Returns:
        The folder for PATH; ``calls`` in it has a line for each call.
    """
    folder.mkdir(exist_ok=True)
    for name, output in outputs.items():
        script = folder / name
        script.write_text(
            f'#!/bin/sh\necho "{name} $*" >> {folder}/calls\ncat <<"END"\n{output}\nEND\n'
        )
        script.chmod(0o755)
    return folder
