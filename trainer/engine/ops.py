"""DeepSpeed's C++ ops, compiled once per node before the ranks need them.

torch guards a build with a ``lock`` file that names nobody: after a killed build every later one
waits for it for ever. A claim beside it says who builds, so that a dead builder's lock is removed.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil
from torch.utils.cpp_extension import get_default_build_root

from trainer.config import EngineConfig
from trainer.engine import collectives
from trainer.errors import ConfigError

LOG = logging.getLogger(__name__)
STALE_LOCK_S = 1800  # a lock of an unknown builder; a build takes minutes on a busy machine
CLAIM = "kuroshio_builder.json"

NEEDS = {
    "cpu_adam": "a C++ compiler and Python's headers (apt-get install g++ python3-dev)",
    "async_io": "a C++ compiler, headers, libaio (apt-get install g++ python3-dev libaio-dev)",
}
# Loading one builds these, each in a folder of its own.
BUILT_WITH = {"cpu_adam": ("cpu_adam",), "async_io": ("async_io", "pin_memory")}


def needed_ops(engine: EngineConfig) -> list[str]:
    """Return the ops that the engine group's offload needs."""
    ops = ["cpu_adam"] if engine.offload_optimizer != "none" else []
    nvme = "nvme" in (engine.offload_optimizer, engine.offload_params)
    return [*ops, "async_io"] if nvme else ops


def build_ops(ops: list[str], local_rank: int, load: Callable[[str], None]) -> None:
    """Build on local rank 0, then load everywhere.

    Args:
        ops: names from ``NEEDS``.
        local_rank: this rank on its node.
        load: builds (if need be) and loads one op; from the engine.

    Raises:
        ConfigError: when an op cannot be built, naming the missing system package.
    """
    if not ops:
        return
    scripts = str(Path(sys.executable).parent)  # ninja sits beside an unactivated venv's python
    if scripts not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = scripts + os.pathsep + os.environ["PATH"]
    failure = ""
    for turn in (True, False):
        if (local_rank == 0) is turn:
            failure = _load_all(ops, load)
        collectives.barrier()
    if collectives.any_over_ranks(bool(failure)):
        raise ConfigError(failure or "an offload op could not be built on another rank")


def _load_all(ops: list[str], load: Callable[[str], None]) -> str:
    """Build and load; return what is wrong, or an empty string."""
    for op in ops:
        try:
            with ExitStack() as claims:
                for name in BUILT_WITH[op]:
                    claims.enter_context(_Claim(build_folder(name)))
                load(op)
        except Exception as error:  # DeepSpeed raises bare Exceptions and RuntimeErrors here
            return f"offload needs DeepSpeed's {op} op, which needs {NEEDS[op]}: {error}"
    return ""


def build_folder(op: str) -> Path:
    """Return where torch builds ``op``."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root:
        return Path(root) / op
    import torch

    build = "cpu" if torch.version.cuda is None else "cu" + torch.version.cuda.replace(".", "")
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    return Path(get_default_build_root()) / f"{python}_{build}" / op


class _Claim:
    """Says who builds in a folder, after removing a dead builder's lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if is_stale(self.folder):
            LOG.warning("removing the lock of a dead build in %s", self.folder)
            (self.folder / "lock").unlink(missing_ok=True)
        if not (self.folder / "lock").exists():
            claim = {"host": socket.gethostname(), "pid": os.getpid()}
            (self.folder / CLAIM).write_text(json.dumps(claim))

    def __exit__(self, *error: object) -> None:
        (self.folder / CLAIM).unlink(missing_ok=True)


def is_stale(folder: Path) -> bool:
    """Return whether ``folder`` has a lock whose builder is dead (or unknown and long gone)."""
    lock = folder / "lock"
    if not lock.exists():
        return False
    try:
        claim = json.loads((folder / CLAIM).read_text())
    except (OSError, ValueError):
        claim = None
    if claim and claim["host"] == socket.gethostname():
        return not psutil.pid_exists(claim["pid"])
    return time.time() - lock.stat().st_mtime > STALE_LOCK_S
