"""Memory and time of the output embedding with its loss: plain logits against the fused head.

    python benchmarks/head.py                      # CPU or the first GPU; 3 minutes on 2 cores
    python benchmarks/head.py --tokens 2048 4096 --hidden 4096

Plain is ``hidden @ weight.T`` with transformers' own causal-LM loss. Each variant runs forward and
backward in a process of its own; its extra peak is what the step adds to weight and hidden states,
gradients included: resident memory on a CPU, allocated memory on a GPU. The best of the repeats
counts, in wall time and in processor time of all threads, which a busy machine disturbs less. The
first number of tokens is compared; at the others the fused head alone shows how its memory grows.
Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

Case = dict[str, int | str]
Result = dict[str, float]


def main() -> None:
    """Measure every case in a fresh process and print the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[32000, 55296])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", help=argparse.SUPPRESS)  # one case as JSON: the child process
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(json.loads(args.case), args.repeats)))
        return
    results = [
        compare(rows, dtype, args.tokens, args.hidden, args.repeats)
        for rows in args.rows
        for dtype in args.dtypes
    ]
    print(json.dumps({"benchmark": "head", "hidden": args.hidden, "results": results}))


def compare(
    rows: int, dtype: str, tokens: list[int], hidden: int, repeats: int
) -> dict[str, float | int | str]:
    """Measure plain and fused for one matrix; print a line of the table for each."""
    case: Case = {"rows": rows, "dtype": dtype, "hidden": hidden}
    plain = run_child(case | {"variant": "plain", "tokens": tokens[0]}, repeats)
    fused = [run_child(case | {"variant": "fused", "tokens": n}, repeats) for n in tokens]
    first, last = fused[0], fused[-1]
    print(
        f"{rows} rows {dtype:8}: memory {first['peak_mb'] / plain['peak_mb']:.2f}, wall time "
        f"{first['wall_s'] / plain['wall_s']:.2f}, processor time "
        f"{first['cpu_s'] / plain['cpu_s']:.2f} of plain"
    )
    return {
        "rows": rows,
        "dtype": dtype,
        "tokens": tokens[0],
        "plain_peak_mb": plain["peak_mb"],
        "fused_peak_mb": first["peak_mb"],
        "memory_ratio": first["peak_mb"] / plain["peak_mb"],
        "time_ratio": first["wall_s"] / plain["wall_s"],
        "cpu_time_ratio": first["cpu_s"] / plain["cpu_s"],
        "loss_difference": abs(first["loss"] - plain["loss"]),
        "most_tokens": tokens[-1],
        "growth_mb": last["peak_mb"] - first["peak_mb"],
    }


def run_child(case: Case, repeats: int) -> Result:
    """Measure one case in a fresh interpreter and print its line of the table."""
    command = [sys.executable, __file__, "--case", json.dumps(case), "--repeats", str(repeats)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: Result = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{case['rows']:6} rows {case['dtype']:8} {case['tokens']:6} tokens {case['variant']}: "
        f"{result['peak_mb']:7.0f} MB {result['wall_s']:7.2f} s wall {result['cpu_s']:7.2f} s "
        f"processor, loss {result['loss']:.4f}",
        flush=True,
    )
    return result


def measure(case: Case, repeats: int) -> Result:
    """Run forward and backward ``repeats`` times; return extra peak memory and best times."""
    import torch

    from benchmarks.inputs.peaks import measure_repeats

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    options = {"dtype": getattr(torch, str(case["dtype"])), "device": device}
    rows, tokens, dim = int(case["rows"]), int(case["tokens"]), int(case["hidden"])
    weight = torch.randn(rows, dim, generator=generator, **options).mul_(0.02).requires_grad_()
    hidden = torch.randn(1, tokens, dim, generator=generator, **options).requires_grad_()
    labels = torch.randint(0, rows, (1, tokens), generator=generator, device=device)
    compute = VARIANTS[str(case["variant"])]
    compute(hidden[:, :8], weight, labels[:, :8]).backward()  # loads kernels, starts threads
    hidden.grad = weight.grad = None

    def run() -> torch.Tensor:
        hidden.grad = weight.grad = None
        loss = compute(hidden, weight, labels) / (tokens - 1)
        loss.backward()
        return loss

    return measure_repeats(run, repeats)


def compute_plain(hidden, weight, labels):  # type: ignore[no-untyped-def]
    """Return the summed loss from whole logits, as a transformers model computes it."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss(hidden @ weight.T, labels, len(weight), num_items_in_batch=1)


def compute_fused(hidden, weight, labels):  # type: ignore[no-untyped-def]
    """Return the summed loss without whole logits."""
    from trainer.losses.cross_entropy import linear_cross_entropy, next_token_targets

    return linear_cross_entropy(hidden.flatten(0, 1), weight, next_token_targets(labels).flatten())


VARIANTS: dict[str, Callable] = {"plain": compute_plain, "fused": compute_fused}


if __name__ == "__main__":
    main()
