"""Training step of the real loop against a bare PyTorch loop over the same model and batches.

    python benchmarks/train.py                       # CPU or the first GPU; 3 minutes on 2 cores
    python benchmarks/train.py --precision fp32 --engines zero2 --ranks 2
    OMP_NUM_THREADS=1 python benchmarks/train.py     # threads that wait for a busy core spin: this
                                                     # keeps the waiting out of the processor time

The bare loop is what one would write by hand (``inputs/bare_loop.py``). torch.autocast would be
other arithmetic (it casts the fp32 weights in every forward) and is not compared. Gradients of
several micro-batches add up in the precision of the weights, as under ZeRO-0; ZeRO-1 and 2 add
them in fp32.

Ours is the ``pretrain`` stage under ``fit``, with its log lines, ``metrics.jsonl`` and guards.
Every variant has processes of its own, all are alive at once and take turns of a few steps, so
that what else the machine does meets them alike. The median over the turns counts, in wall time
and in processor time of all threads and ranks. Memory is the peak of one rank above what it held
before the model was made: resident memory on a CPU, allocated memory on a GPU. Prints a table, then
one line of JSON.
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

from benchmarks.inputs.run_inputs import find_tokenizer, overrides, place_of_ranks  # noqa: E402
from benchmarks.inputs.turns import RankGroup, Turns, take_turns, time_ratio  # noqa: E402

if TYPE_CHECKING:
    import torch

    from trainer.data.batches.collate import Batch
    from trainer.stage import Context


def main() -> None:
    """Start the variants, give them turns, print the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engines", nargs="+", default=["zero0", "zero2"])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--global-batch-tokens", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1, help="of a turn")
    parser.add_argument("--tokenizer", type=Path, help="its size decides the model's rows")
    parser.add_argument("--rank", help=argparse.SUPPRESS)  # one rank of a variant, as JSON
    args = parser.parse_args()
    if args.rank:
        run_rank(json.loads(args.rank))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = compare(args, Path(folder))
    print(json.dumps(result))


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the figures of every variant and their ratios to the bare loop's."""
    from launch.compose import compose_values
    from trainer.config import load_config
    from trainer.data.prepared.prepare import ensure_prepared

    tokenizer = find_tokenizer(args.tokenizer, folder)
    common = [
        *overrides(tokenizer, folder),
        f"engine.precision={args.precision}",
        f"loop.micro_batch_size={args.micro_batch_size}",
        f"loop.global_batch_tokens={args.global_batch_tokens}",
        "loop.max_steps=1000000",
    ]
    variants = {}
    for name in ["bare", *args.engines]:
        engine = "zero0" if name == "bare" else name
        run_dir = f"run_dir='{folder / name}'"
        variants[name] = compose_values([*common, f"engine={engine}", run_dir])
    ensure_prepared(load_config(variants["bare"]).data, tokenizer)
    with contextlib.ExitStack() as stack:
        groups = []
        for name, values in variants.items():
            case = json.dumps({"variant": name, "values": values, "steps": args.steps})
            command = [sys.executable, __file__, "--rank", case]
            group = RankGroup(name, command, place_of_ranks(args.ranks), folder)
            groups.append(stack.enter_context(group))
        figures = take_turns(groups, args.turns)
    return describe(figures, args)


def describe(figures: dict[str, dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Print the table and return everything as plain data."""
    bare = figures["bare"]
    print(
        f"{bare['num_params'] / 1e6:.1f} M parameters, {bare['precision']} on {bare['device']}, "
        f"{args.ranks} ranks, {args.global_batch_tokens} tokens a step in micro-batches of "
        f"{args.micro_batch_size} rows; load average {os.getloadavg()[0]:.1f}"
    )
    for name, own in figures.items():
        own["speed_ratio"] = time_ratio(bare["turn_wall_s"], own["turn_wall_s"])
        own["cpu_speed_ratio"] = time_ratio(bare["turn_cpu_s"], own["turn_cpu_s"])
        own["memory_ratio"] = own["peak_mb"] / bare["peak_mb"]
        print(
            f"{name:14} {own['tokens_per_s']:9.0f} tokens/s, {own['tokens_per_cpu_s']:9.0f} per "
            f"processor second, peak {own['peak_mb']:6.0f} MB: {own['speed_ratio']:.3f}, "
            f"{own['cpu_speed_ratio']:.3f} and {own['memory_ratio']:.2f} of bare; "
            f"loss {own['loss']:.4f}"
        )
    return {
        "benchmark": "train",
        "options": {k: str(v) for k, v in vars(args).items()},
        "results": figures,
    }


def run_rank(case: dict[str, Any]) -> None:
    """Train one variant until the parent has seen enough."""
    from trainer.config import load_config
    from trainer.engine.engine import init_distributed
    from trainer.stage import Context

    if case["variant"] == "bare":
        from benchmarks.inputs.bare_loop import train_barely as train
    else:
        train = train_for_real
    config = load_config(case["values"])
    rank, world_size, local_rank = (
        int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    )
    device = init_distributed(local_rank, config.cluster.timeout_s)
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    context = Context(config, run_dir, rank, world_size, local_rank)
    train(context, device, case["steps"])


def train_for_real(context: Context, device: torch.device, steps: int) -> None:
    """Run the stage under the real loop."""
    from trainer.stages.pretrain import Pretrain

    class TurnByTurn(Pretrain):
        def train_step(self, step: int, batches: Iterator[Batch]) -> int:
            turns.begin_step(step, self.facts)
            return super().train_step(step, batches)

        def loss(self, batch: Batch) -> torch.Tensor:
            turns.tokens += batch.num_tokens
            turns.targets += batch.num_trained
            return super().loss(batch)

        def facts(self) -> dict[str, Any]:
            journal = (context.run_dir / "metrics.jsonl").read_text().splitlines()
            return {"loss": json.loads(journal[-1])["loss"]}

    turns = Turns(steps, device)
    TurnByTurn().run(context)


if __name__ == "__main__":
    main()
