"""Reward models: rows a second and memory, against TRL, LLaMA-Factory and a bare loop.

    python benchmarks/reward.py                 # CPU or the first GPU; ours against the bare loop
    KUROSHIO_PEERS_PYTHON=/tmp/peers/bin/python python benchmarks/reward.py   # and the peers

The peers' environment is that of ``peers.py``; without the variable they are left out, and named.
A LLaMA of 58 M parameters from scratch with one output, full training, the same pairs in every
turn; a row is a pair. In bf16 ours and the bare loop hold bf16 weights with fp32 masters, the peers
cast fp32 weights.

Variants take turns as in ``train.py``; medians over turns count. Data: ../shared/data's HH-RLHF,
else samples/. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.inputs.our_run import pair_values, run_pairs_in_turns  # noqa: E402
from benchmarks.inputs.preference_turns import compare, read_options  # noqa: E402

VARIANTS = ("ours", "bare", "trl", "llamafactory")


def main() -> None:
    """Compare, or be a rank of ours."""
    args = read_options(__doc__ or "", VARIANTS)
    if args.rank:
        from trainer.stages.reward import Reward

        run_pairs_in_turns(Reward, json.loads(args.rank))
    else:
        compare(args, "reward", values_of)


def values_of(variant: str, case: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Return our config."""
    return pair_values(case, run_dir, [])


if __name__ == "__main__":
    main()
