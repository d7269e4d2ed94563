"""Fixtures and rules for all tests."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from build_ops import keep_ops_in_venv

pytest_plugins = ["training_fixtures", "chat_fixtures", "cluster_fixtures", "fault_record"]

# What a cluster's or a user's shell may hold and a test must not inherit: a rank's place, where
# torch and DeepSpeed listen, accounts that runs would be sent to.
FOREIGN_PREFIXES = ("SLURM_", "OMPI_", "PMI", "TORCHELASTIC_", "WANDB_", "HYDRA_")
FOREIGN = (
    "KUROSHIO_FAULT",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def pytest_configure(config: pytest.Config) -> None:
    """Clean the environment that tests and the processes they start inherit."""
    for key in [k for k in os.environ if k in FOREIGN or k.startswith(FOREIGN_PREFIXES)]:
        del os.environ[key]
    os.environ["WANDB_MODE"] = "offline"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    keep_ops_in_venv()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what would start after TEST_DEADLINE (seconds since 1970), rather than be cut short."""
    if time.time() > float(os.environ.get("TEST_DEADLINE", "inf")):
        pytest.skip("out of time")


@pytest.fixture(scope="session")
def cpu_adam() -> None:
    """Skip the test when DeepSpeed's CPU Adam cannot be built here."""
    require_op("cpu_adam")


@pytest.fixture(scope="session")
def async_io() -> None:
    """Skip the test when DeepSpeed's NVMe op cannot be built here."""
    require_op("async_io")


def require_op(op: str) -> None:
    """Build or find one of DeepSpeed's ops in a process of its own."""
    script = Path(__file__).with_name("build_ops.py")
    done = subprocess.run([sys.executable, script, op], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(next(line for line in done.stderr.splitlines() if line.startswith(f"{op}: ")))
