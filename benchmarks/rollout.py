"""Answers during training: parameters gathered once, against per-token gathering and transformers.

    python benchmarks/rollout.py                      # CPU or the first GPU; 3 minutes on 2 cores
    python benchmarks/rollout.py --engines zero3 --ranks 1 --precision fp32
    OMP_NUM_THREADS=1 python benchmarks/rollout.py    # as in train.py

A LLaMA of 58 M parameters from scratch answers 8 prompts of 40 to 80 tokens with 64 tokens each,
sampled at temperature 1. The ways, on the same engine one after the other, several times:

rollout      ``rollout_model`` and ``generate``: what stage ppo does
transformers ``generate`` of transformers, inside ``rollout_model``
per_token    ``generate`` of transformers with DeepSpeed's hooks on, which gather every parameter
             anew for every token (ZeRO-3 only)

The best of the repeats counts, in wall time and in processor time of one rank. Prints a table, then
one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.inputs.ranks import compose_case, report, run_ranks, start_rank  # noqa: E402
from benchmarks.inputs.run_inputs import find_tokenizer  # noqa: E402

if TYPE_CHECKING:
    from trainer.engine.engine import Engine


def main() -> None:
    """Measure every engine in fresh processes and print the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engines", nargs="+", default=["zero2", "zero3"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--prompts", type=int, default=8, help="of each rank")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rank", help=argparse.SUPPRESS)  # one rank of a case, as JSON
    args = parser.parse_args()
    if args.rank:
        run_rank(json.loads(args.rank))
        return
    results = []
    for engine in args.engines:
        for num_ranks in args.ranks:
            with tempfile.TemporaryDirectory() as folder:
                results.append(measure_case(engine, num_ranks, args, Path(folder)))
    print(json.dumps({"benchmark": "rollout", "results": results}))


def measure_case(
    engine: str, num_ranks: int, args: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Run the ranks of one engine; print its lines of the table and return its figures."""
    tokenizer = find_tokenizer(None, folder)
    case = {key: vars(args)[key] for key in ("prompts", "tokens", "repeats")}
    case |= {"values": compose_case(engine, args.precision, tokenizer, folder)}
    case |= {"tokenizer": str(tokenizer)}
    result: dict[str, Any] = {"engine": engine, "ranks": num_ranks}
    result |= run_ranks(__file__, num_ranks, case, f"{engine} on {num_ranks} ranks")
    show(result)
    return result


def show(result: dict[str, Any]) -> None:
    """Print a line for each way."""
    ours = result["ways"]["rollout"]
    for way, figures in result["ways"].items():
        print(
            f"{result['engine']:6} {result['ranks']} ranks {result['precision']:5} {way:13}"
            f"{figures['wall_s']:8.2f} s wall {figures['cpu_s']:8.2f} s processor: "
            f"{figures['wall_s'] / ours['wall_s']:6.2f} and "
            f"{figures['cpu_s'] / ours['cpu_s']:6.2f} times ours",
            flush=True,
        )


def run_rank(case: dict[str, Any]) -> None:
    """Measure all ways as one rank; rank 0 prints what it took."""
    import torch
    import torch.distributed as dist

    engine, device = start_rank(case["values"], case["tokenizer"])
    best: dict[str, dict[str, float]] = {}
    for _ in range(case["repeats"]):
        for name, way in make_ways(engine, case).items():
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            took = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
            old = best.get(name, took)
            best[name] = {key: min(old[key], took[key]) for key in took}
    report(engine.rank, {"precision": engine.precision, "ways": best})


def make_ways(engine: Engine, case: dict[str, Any]) -> dict[str, Callable[[], None]]:
    """Return what answers the same prompts, by name."""
    import torch

    from trainer.rollout.generate import generate, pad_left, rollout_model
    from trainer.rollout.sampling import Sampling, draw_uniforms

    model: Any = engine.module
    draw = torch.Generator().manual_seed(engine.rank)
    lengths = torch.randint(40, 80, (case["prompts"],), generator=draw).tolist()
    prompts = [torch.randint(3, 250, (n,), generator=draw).tolist() for n in lengths]
    sampling = Sampling(case["tokens"])
    uniforms = draw_uniforms(0, 0, range(len(prompts)), case["tokens"])
    input_ids, mask = pad_left(prompts, engine.device)

    def roll_out() -> None:
        with rollout_model(engine, model):
            generate(model, prompts, sampling, (), uniforms)

    @torch.no_grad()
    def generate_plainly() -> None:
        model.decoder.generate(
            input_ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=case["tokens"],
            min_new_tokens=case["tokens"],
            pad_token_id=0,
            eos_token_id=2,
        )

    def generate_gathered() -> None:
        with rollout_model(engine, model):
            generate_plainly()

    def generate_per_token() -> None:
        model.eval()
        generate_plainly()
        model.train()

    ways: dict[str, Callable[[], None]] = {"rollout": roll_out, "transformers": generate_gathered}
    if engine.config.zero_stage == 3:
        ways["per_token"] = generate_per_token
    return ways


if __name__ == "__main__":
    main()
