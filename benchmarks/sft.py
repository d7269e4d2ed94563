"""Fine-tuning: targets a second and memory, packed and padded, against Trainer and a bare loop.

    python benchmarks/sft.py                    # CPU or the first GPU; 5 minutes on 2 cores
    python benchmarks/sft.py --precision fp32 --variants ours-packed bare-packed

A LLaMA of 58 M parameters from scratch, full tuning, conversations cut at 512 tokens and the same
number of rows a step for all. ``packed`` are our loader's rows of whole conversations, each seen
alone, also for the bare loop (``inputs/bare_loop.py``) and for transformers' Trainer; ``padded`` is
a conversation a row: ours deals a step's rows by length, Trainer draws them as they come. In bf16
ours and the bare loop hold bf16 weights with fp32 masters; Trainer's autocast casts fp32 weights.

Targets are trained tokens; tokens are all but padding. Variants take turns as in ``train.py``;
medians over turns count. Data: ../shared/data's alpaca_en_demo.json, else samples/. Prints a table,
then one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.inputs.chat_inputs import chat_overrides, find_conversations  # noqa: E402
from benchmarks.inputs.run_inputs import find_tokenizer, place_of_ranks  # noqa: E402
from benchmarks.inputs.turns import RankGroup, Turns, median_rate, take_turns  # noqa: E402

if TYPE_CHECKING:
    import torch

    from trainer.data.batches.collate import Batch
    from trainer.stage import Context

VARIANTS = ("bare-packed", "ours-packed", "trainer-packed", "ours-padded", "trainer-padded")
PADDED_STEPS = 3  # of a turn; padded steps are shorter, and uneven


def main() -> None:
    """Start the variants, give them turns, print the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--engine", default="zero0")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--data", type=Path, help="a file of conversations")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--rank", help=argparse.SUPPRESS)  # a variant, as JSON
    args = parser.parse_args()
    if args.rank:
        run_rank(json.loads(args.rank))
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = compare(args, Path(folder))
    describe(figures)
    options = {key: str(value) for key, value in vars(args).items()}
    print(json.dumps({"benchmark": "sft", "options": options, "results": figures}))


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the figures of every variant."""
    with contextlib.ExitStack() as stack:
        groups = [
            stack.enter_context(group) for group in start_variants(args, args.variants, folder)
        ]
        return take_turns(groups, args.turns)


def start_variants(args: argparse.Namespace, names: list[str], folder: Path) -> Iterator[RankGroup]:
    """Prepare the data and start the variants of this environment, one after another."""
    from launch.compose import compose_values
    from trainer.config import load_config
    from trainer.data.prepared.prepare import ensure_prepared

    tokenizer = find_tokenizer(args.tokenizer, folder)
    common = [
        *chat_overrides(find_conversations(args.data), tokenizer, folder),
        f"engine={args.engine}",
        f"engine.precision={args.precision}",
        f"loop.micro_batch_size={args.micro_batch_size}",
        f"loop.global_batch_tokens={args.rows * 512}",
    ]
    for name in names:
        packed = name.endswith("packed")
        own = [f"data.packing={str(packed).lower()}", f"run_dir='{folder / name}'"]
        values = compose_values([*common, *own])
        ensure_prepared(load_config(values).data, tokenizer)
        steps = 1 if packed else PADDED_STEPS
        case = json.dumps({"variant": name, "values": values, "steps": steps})
        script = str(ROOT / "benchmarks" / "sft.py")
        yield RankGroup(name, [sys.executable, script, "--rank", case], place_of_ranks(1), folder)


def describe(figures: dict[str, Any]) -> None:
    """Print the table; add ours as multiples of the others' targets a second."""
    some = next(iter(figures.values()))
    print(
        f"{some['num_params'] / 1e6:.1f} M parameters, {some['precision']} on {some['device']}; "
        f"load average {os.getloadavg()[0]:.1f}"
    )
    for name, own in figures.items():
        print(
            f"{name:19} {own['targets_per_s']:6.0f} targets/s ({own['tokens_per_s']:.0f} tokens/s, "
            f"{own['targets_per_cpu_s']:.0f} targets per processor second), peak "
            f"{own['peak_mb']:.0f} MB"
        )
    for name, own in figures.items():
        if name.startswith("ours"):
            own["rate_of"] = {other: rate_of(own, them) for other, them in figures.items()}
            ratios = (f"{rate:.2f} × {other}" for other, rate in own["rate_of"].items())
            print(f"{name}: {', '.join(ratios)}")


def rate_of(own: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the median over turns of our targets a second / theirs, each beside its neighbour."""
    ours, theirs = (
        [targets / wall for targets, wall in zip(f["turn_targets"], f["turn_wall_s"], strict=True)]
        for f in (own, other)
    )
    return median_rate(ours, theirs)


def run_rank(case: dict[str, Any]) -> None:
    """Train one variant until the parent has seen enough."""
    from trainer.config import load_config
    from trainer.engine.engine import init_distributed
    from trainer.stage import Context

    who = case["variant"].partition("-")[0]
    if who == "bare":
        from benchmarks.inputs.bare_loop import train_barely as train
    elif who == "trainer":
        from benchmarks.inputs.hf_trainer import train_with_trainer as train
    else:
        train = train_for_real
    config = load_config(case["values"])
    device = init_distributed(0, config.cluster.timeout_s)
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    train(Context(config, run_dir, 0, 1, 0), device, case["steps"])


def train_for_real(context: Context, device: torch.device, steps: int) -> None:
    """Run the stage under the real loop."""
    from trainer.engine.engine import choose_precision
    from trainer.stages.sft import Sft

    class TurnByTurn(Sft):
        def train_step(self, step: int, batches: Iterator[Batch]) -> int:
            turns.begin_step(step, self.facts)
            return super().train_step(step, batches)

        def loss(self, batch: Batch) -> torch.Tensor:
            turns.tokens += batch.num_tokens
            turns.targets += batch.num_trained
            return super().loss(batch)

        def facts(self) -> dict[str, Any]:
            journal = (context.run_dir / "metrics.jsonl").read_text().splitlines()
            parameters = self.policy.module.parameters()
            return {
                "loss": json.loads(journal[-1])["loss"],
                "num_params": sum(parameter.numel() for parameter in parameters),
                "precision": choose_precision(context.config.engine.precision),
                "device": device.type,
            }

    turns = Turns(steps, device)
    TurnByTurn(sample_tokens=0).run(context)


if __name__ == "__main__":
    main()
