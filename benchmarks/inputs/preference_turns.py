"""What ``dpo.py`` and ``reward.py`` share: options, variants, peers, the table."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.inputs.our_run import rank_command
from benchmarks.inputs.preference_inputs import find_pairs, write_inputs
from benchmarks.inputs.run_inputs import ROOT, find_tokenizer, place_of_ranks
from benchmarks.inputs.turns import RankGroup, median_rate, take_turns

VARIABLE = "KUROSHIO_PEERS_PYTHON"
Values = Callable[[str, dict[str, Any], Path], dict[str, Any]]


def read_options(doc: str, variants: Sequence[str]) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(variants), choices=variants)
    parser.add_argument("--engine", default="zero0")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--pairs", type=int, default=16, help="of a turn")
    parser.add_argument("--micro-batch-size", type=int, default=2, help="pairs; ours: rows")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--data", type=Path, help="a file of pairs")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--rank", help=argparse.SUPPRESS)  # a variant, as JSON
    return parser.parse_args()


def compare(args: argparse.Namespace, stage: str, values_of: Values) -> None:
    """Let the variants take turns; print the table and the line of JSON.

    Args:
        args: of ``read_options``.
        stage: dpo or reward; also the benchmark's name and its script's.
        values_of: the config of one of our variants, from its name, the case and the run folder.
    """
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        case = make_case(args, stage, folder)
        groups = []
        for variant in args.variants:
            command = command_for(variant, case, folder, values_of)
            if command is None:
                continue
            environ = place_of_ranks(1) | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
            groups.append(stack.enter_context(RankGroup(variant, command, environ, folder)))
        if not groups:
            raise SystemExit("none of these variants can run here")
        figures = take_turns(groups, args.turns)
    describe(figures)
    options = {key: str(value) for key, value in vars(args).items()}
    print(json.dumps({"benchmark": stage, "options": options, "results": figures}))


def make_case(args: argparse.Namespace, stage: str, folder: Path) -> dict[str, Any]:
    """Write the inputs; return what every variant is told."""
    from trainer.engine.engine import choose_precision

    tokenizer = find_tokenizer(args.tokenizer, folder)
    return {
        "stage": stage,
        "precision": choose_precision(args.precision),
        "engine": args.engine,
        "micro_batch_size": args.micro_batch_size,
        "num_micro_batches": args.pairs // args.micro_batch_size,
        **write_inputs(find_pairs(args.data), args.pairs, tokenizer, folder),
    }


def command_for(
    variant: str, case: dict[str, Any], folder: Path, values_of: Values
) -> list[str] | None:
    """Return the command that starts a variant; None, with the reason, if it cannot be."""
    who, _, way = variant.partition("-")
    if who == "ours":
        script = str(ROOT / "benchmarks" / f"{case['stage']}.py")
        return rank_command(script, values_of(variant, case, folder / variant))
    case = case | {"peer": who, "way": way or "plain", "out": str(folder / variant)}
    file = folder / f"{variant}.json"
    file.write_text(json.dumps(case), encoding="utf-8")
    inputs = ROOT / "benchmarks" / "inputs"
    if who == "bare":
        return [sys.executable, str(inputs / "bare_pairs.py"), str(file)]
    python = os.environ.get(VARIABLE)
    if not python or not is_installed(python, who):
        why = f"{who} is not installed in {python}" if python else f"{VARIABLE} is not set"
        print(f"{variant}: left out, {why}; see the beginning of benchmarks/peers.py")
        return None
    return [python, str(inputs / "preference_peers.py"), str(file)]


def is_installed(python: str, package: str) -> bool:
    """Ask another environment for a package."""
    ask = f"import importlib.metadata as m; m.version({package!r})"
    return subprocess.run([python, "-c", ask], capture_output=True, check=False).returncode == 0


def describe(figures: dict[str, dict[str, Any]]) -> None:
    """Print the table; add every variant's speed and memory as multiples of ours."""
    some = next(iter(figures.values()))
    print(f"{some['precision']} on {some['device']}; load average {os.getloadavg()[0]:.1f}")
    for name, own in figures.items():
        own["rows_per_s"], own["rows_per_cpu_s"] = own["targets_per_s"], own["targets_per_cpu_s"]
        print(
            f"{name:22} {own['rows_per_s']:6.2f} rows/s ({own['tokens_per_s']:.0f} tokens/s, "
            f"{own['rows_per_cpu_s']:.2f} rows per processor second), peak {own['peak_mb']:.0f} MB"
        )
    for name, own in figures.items():
        if name.startswith("ours"):
            others = {other: f for other, f in figures.items() if other != name}
            own["rate_of"] = {other: rate_of(own, f) for other, f in others.items()}
            own["memory_of"] = {o: own["peak_mb"] / f["peak_mb"] for o, f in others.items()}
            ratios = (
                f"{own['rate_of'][other]:.2f} × {other} at {own['memory_of'][other]:.2f} × memory"
                for other in others
            )
            print(f"{name}: {', '.join(ratios)}")


def rate_of(own: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the median over turns of our rows a second / theirs, each beside its neighbour."""
    ours, theirs = (
        [rows / wall for rows, wall in zip(f["turn_targets"], f["turn_wall_s"], strict=True)]
        for f in (own, other)
    )
    return median_rate(ours, theirs)
