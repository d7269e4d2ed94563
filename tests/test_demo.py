"""``make demo``, from nothing to the table and a model that plain transformers loads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_demo_ends_with_a_table_and_a_report(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "samples/demo.py"],
        cwd=ROOT,
        env={**os.environ, "DEMO_DIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "continued/report.html").stat().st_size > 10_000
    assert (tmp_path / "vocab/audit.html").is_file()
    row = next(line for line in done.stdout.splitlines() if "zh_tw" in line and "→" in line)
    before, after, _, extended, trained = map(float, re.findall(r"\d+\.\d+", row))
    assert after < before  # tokens per character
    assert trained < extended  # bits per character
    prompts = [line for line in done.stdout.splitlines() if line.startswith("春天 → 春天")]
    assert prompts and len(prompts[0]) > len("春天 → 春天")
