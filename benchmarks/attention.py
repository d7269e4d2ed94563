"""Time and memory of a whole model on packed rows: documents attended one by one, or a row mask.

    python benchmarks/attention.py                 # CPU or the first GPU; 2 minutes on 2 cores
    python benchmarks/attention.py --tokens 8192 --documents 100 300 1000

The mask is transformers' own way: length x length for the row, made from position ids. Each case
runs forward and backward of two layers in a process of its own; its extra peak is what the step
adds to the weights: resident memory on a CPU, allocated memory on a GPU. The best of the repeats
counts, in wall time and in processor time of all threads, which a busy machine disturbs less.
Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

Case = dict[str, Any]
Result = dict[str, float]


def main() -> None:
    """Measure every case in fresh processes and print the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--documents", type=int, nargs="+", default=[300, 1000])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--case", help=argparse.SUPPRESS)  # one case as JSON: the child process
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(json.loads(args.case), args.repeats)))
        return
    results = []
    for length, dtype in product(args.documents, args.dtypes):
        case = {"tokens": args.tokens, "length": length, "dtype": dtype, "hidden": args.hidden}
        results.append(compare(case, args.repeats))
    print(json.dumps({"benchmark": "attention", "results": results}))


def compare(case: Case, repeats: int) -> Case:
    """Measure both ways; print a line for each and one of ratios."""
    ways = {way: run_child(case | {"way": way}, repeats) for way in ("mask", "documents")}
    ratios = {
        key: ways["documents"][key] / ways["mask"][key] for key in ("peak_mb", "wall_s", "cpu_s")
    }
    print(
        f"documents of {case['length']:5} tokens, {case['dtype']:8}: memory "
        f"{ratios['peak_mb']:.2f}, wall time {ratios['wall_s']:.2f}, processor time "
        f"{ratios['cpu_s']:.2f} of the mask's",
        flush=True,
    )
    difference = abs(ways["documents"]["loss"] - ways["mask"]["loss"])
    return case | {f"{key}_ratio": value for key, value in ratios.items()} | {
        "mask_peak_mb": ways["mask"]["peak_mb"],
        "documents_peak_mb": ways["documents"]["peak_mb"],
        "loss_difference": difference,
    }  # fmt: skip


def run_child(case: Case, repeats: int) -> Result:
    """Measure one case in a fresh interpreter and print its line of the table."""
    command = [sys.executable, __file__, "--case", json.dumps(case), "--repeats", str(repeats)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: Result = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{case['length']:6} {case['dtype']:8} {case['way']:9}: {result['peak_mb']:7.0f} MB "
        f"{result['wall_s']:6.2f} s wall {result['cpu_s']:6.2f} s processor",
        flush=True,
    )
    return result


def measure(case: Case, repeats: int) -> Result:
    """Run forward and backward ``repeats`` times; return extra peak memory and best times."""
    import torch

    from benchmarks.inputs.peaks import measure_repeats

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(case, device)
    # Lengths around the mean, as data has them, the same for both ways.
    lengths = draw_lengths(case["tokens"], case["length"])
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    input_ids = torch.arange(case["tokens"], device=device)[None] % 64
    labels = input_ids.masked_fill(position_ids == 0, -100)
    model(input_ids=input_ids[:, :64], position_ids=position_ids[:, :64], labels=labels[:, :64])

    def compute() -> torch.Tensor:
        model.zero_grad()
        loss = model(input_ids=input_ids, position_ids=position_ids, labels=labels)
        mean: torch.Tensor = loss / case["tokens"]
        mean.backward()
        return mean

    return measure_repeats(compute, repeats)


def make_model(case: Case, device: str) -> Any:
    """Return two layers with a small vocabulary, so that attention is most of the work."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trainer.models.language_model import LanguageModel

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=case["hidden"],
        intermediate_size=2 * case["hidden"],
        num_hidden_layers=2,
        num_attention_heads=case["hidden"] // 64,
        num_key_value_heads=max(1, case["hidden"] // 256),
        vocab_size=64,
        max_position_embeddings=case["tokens"],
    )
    decoder = LlamaForCausalLM(config).to(device, getattr(torch, case["dtype"]))
    model = LanguageModel(decoder, 64)
    if case["way"] == "mask":
        decoder.set_attn_implementation("sdpa")
    return model


def draw_lengths(tokens: int, mean: int) -> list[int]:
    """Return document lengths from half to one and a half of the mean that fill a row."""
    import random

    draw, lengths = random.Random(0), []
    while sum(lengths) < tokens:
        lengths.append(draw.randint(mean // 2, mean + mean // 2))
    lengths[-1] -= sum(lengths) - tokens
    return lengths


if __name__ == "__main__":
    main()
