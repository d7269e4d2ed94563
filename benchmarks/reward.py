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
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.inputs.our_run import facts_of, make_stage, pair_values, start_rank  # noqa: E402
from benchmarks.inputs.preference_turns import compare, read_options  # noqa: E402
from benchmarks.inputs.turns import Turns  # noqa: E402

if TYPE_CHECKING:
    import torch

    from trainer.data.batches.collate import Batch

VARIANTS = ("ours", "bare", "trl", "llamafactory")


def main() -> None:
    """Compare, or be a rank of ours."""
    args = read_options(__doc__ or "", VARIANTS)
    if args.rank:
        run_rank(json.loads(args.rank))
    else:
        compare(args, "reward", values_of)


def values_of(variant: str, case: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Return our config."""
    return pair_values(case, run_dir, [])


def run_rank(case: dict[str, Any]) -> None:
    """Run the stage under the real loop until the parent has seen enough."""
    from trainer.stages.reward import Reward

    class TurnByTurn(Reward):
        def train_step(self, step: int, batches: Iterator[Batch]) -> int:
            turns.begin_step(step, lambda: facts_of(context, self.policy, device))
            return super().train_step(step, batches)

        def loss(self, batch: Batch) -> torch.Tensor:
            assert batch.examples is not None
            turns.tokens += batch.num_tokens
            turns.targets += batch.examples.num_pairs
            return super().loss(batch)

    context, device = start_rank(case)
    turns = Turns(1, device)
    make_stage(TurnByTurn, context).run(context)


if __name__ == "__main__":
    main()
