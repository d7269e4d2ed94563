"""What is planned of weights, gradients and optimizer, against real engines, byte by byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.inputs.planned_memory import STATE_CASES, planned_states

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    """Return what engines of every kind take, measured in one process of its own."""
    command = [sys.executable, str(ROOT / "benchmarks/planning.py"), "--measure", "states"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("number", range(len(STATE_CASES)), ids=[str(c) for c in STATE_CASES])
def test_states_are_planned_exactly(measured: list[dict[str, Any]], number: int) -> None:
    assert measured[number] == planned_states(STATE_CASES[number])
