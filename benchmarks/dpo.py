"""DPO: rows a second and memory, against TRL, LLaMA-Factory and a bare loop.

    python benchmarks/dpo.py                    # CPU or the first GPU; ours against the bare loop
    KUROSHIO_PEERS_PYTHON=/tmp/peers/bin/python python benchmarks/dpo.py   # and the peers

The peers' environment is that of ``peers.py``; without the variable they are left out, and named.
A LLaMA of 58 M parameters from scratch, the sigmoid loss, the same pairs in every turn; a row is a
pair. ``cached`` and ``precomputed`` have what the reference says from before the first turn (what
that takes is not counted, as it is done once); ``streaming`` and the plain names run a frozen copy
beside the policy; ``lora`` trains adapters of rank 8, whose reference is the model without them.
In bf16 ours and the bare loop hold bf16 weights with fp32 masters, the peers cast fp32 weights.

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

LORA = ["peft=lora", "peft.rank=8", "peft.target_modules=all-linear"]
OURS = {
    "ours-cached": ["stage.reference=cached"],
    "ours-streaming": ["stage.reference=streaming"],
    "ours-lora": ["stage.reference=adapter_off", *LORA],
}
PEERS = ("trl-precomputed", "trl", "llamafactory", "trl-lora", "llamafactory-lora")
VARIANTS = (*OURS, "bare", *PEERS)


def main() -> None:
    """Compare, or be a rank of ours."""
    args = read_options(__doc__ or "", VARIANTS)
    if args.rank:
        from trainer.stages.dpo import Dpo

        run_pairs_in_turns(Dpo, json.loads(args.rank))
    else:
        compare(args, "dpo", values_of)


def values_of(variant: str, case: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Return the config of one of our variants."""
    return pair_values(case, run_dir, ["stage.sample_tokens=0", *OURS[variant]])


if __name__ == "__main__":
    main()
