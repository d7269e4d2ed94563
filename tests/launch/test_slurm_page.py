"""Every command of docs/slurm.md is taken by the command line, and its tables are true."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import ROOT
from trainer import errors

PAGE = (ROOT / "docs/slurm.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = {
    "sbatch": """case $1 in
      --test-only) echo "sbatch: Job 1 to start at 2026-11-20T10:00:00" >&2 ;;
      *) echo started >"$(dirname "$2")/logs/job-1.out"; date +%N ;;
    esac""",
    "squeue": "exit 0",
    "scancel": "exit 0",
}
SIZES = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}


def rows(header: str) -> list[list[str]]:
    """Return the cells of the table whose first header cell is ``header``."""
    lines = PAGE.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {header} "))
    cells = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells.append([cell.strip() for cell in line.strip("|").split("|")])
    return cells


@pytest.mark.slow
def test_commands_run(tmp_path: Path) -> None:
    """Run all blocks in one shell, with Slurm's commands played by scripts."""
    for name, text in COMMANDS.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    model = tmp_path / "work/u/models/Llama-2-7b"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(SIZES))
    blocks = "\n".join(BLOCKS).replace("/work/$USER", f"{tmp_path}/work/u")
    script = f"""set -euxo pipefail
      export MODEL={model} DATA=zh.jsonl
      kuroshio() {{ {sys.executable} -m launch "$@"; }}
      {blocks}"""
    environ = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    environ |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    for name in ("cpt", "cpt_h200", "cpt_a100"):
        assert (tmp_path / "runs" / name / "job.sbatch").is_file()


def test_clusters_are_those_of_conf() -> None:
    named = {row[0].strip("`") for row in rows("`cluster=`")}
    assert named | {"local"} == {path.stem for path in (ROOT / "conf/cluster").glob("*.yaml")}


def test_exit_codes_are_those_of_the_errors() -> None:
    named = {int(code) for row in rows("code") for code in row[0].split(",")}
    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    assert named == {c.exit_code for c in classes} | {0, 1, 137, 143}
