"""Build DeepSpeed's C++ ops for the tests: ``python tests/build_ops.py [OP...]`` (default: all).

The ops go into the virtual environment, not into the user's cache. The exit code is the number of
ops that did not build; each one's message names the system package it needs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

ENGINES = {
    "cpu_adam": {"zero_stage": 2, "offload_optimizer": "cpu"},
    "async_io": {"zero_stage": 3, "offload_params": "nvme", "nvme_path": "."},
}


def keep_ops_in_venv() -> None:
    """Make torch build extensions inside this virtual environment, unless told where."""
    if sys.prefix != sys.base_prefix:
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))


def main(ops: Sequence[str]) -> int:
    """Build ``ops`` one after another and return how many failed."""
    from trainer.config import EngineConfig
    from trainer.engine.engine import prepare_ops
    from trainer.engine.notices import quiet_deepspeed
    from trainer.errors import ConfigError

    quiet_deepspeed()
    failed = 0
    for op in ops:
        try:
            prepare_ops(EngineConfig(**ENGINES[op]), 0)  # type: ignore[arg-type]
            print(f"{op}: ready in {os.environ.get('TORCH_EXTENSIONS_DIR', 'the user cache')}")
        except ConfigError as error:
            failed += 1
            print(f"{op}: {error}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    keep_ops_in_venv()
    sys.exit(main(sys.argv[1:] or list(ENGINES)))
