"""PPO: the time of a round and of its parts, against TRL, LLaMA-Factory and a bare loop.

    python benchmarks/ppo.py                    # CPU or the first GPU; ours against the bare loop
    KUROSHIO_PEERS_PYTHON=/tmp/peers/bin/python \\
      KUROSHIO_PEERS_PPO_PYTHON=/tmp/peers_ppo/bin/python python benchmarks/ppo.py

The first environment is that of ``peers.py``, for TRL's PPOTrainer. LLaMA-Factory's PPO wants TRL
0.9.6, so it has an environment of its own, with ``pip install llamafactory`` and then
``pip install --no-deps trl==0.9.6 tyro shtab docstring-parser``. Peers without one are left out,
and named.

A round: 8 prompts, a response of 64 tokens to each, scores by a reward model, one update on all of
them. Policy, critic, reference and reward model are LLaMAs of 58 M parameters from scratch; in
LLaMA-Factory the critic is a head on the policy, so that its update trains half of the others'.
``zero2x2`` is ZeRO-2 on two ranks. TRL and LLaMA-Factory run as one process without DeepSpeed.

Variants take turns as in ``train.py``, those on two ranks after the others, for all of them at once
take more than 20 GB; medians over turns count. Prompts: ../shared/data's HH-RLHF,
else samples/. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.inputs.our_run import (  # noqa: E402
    common_overrides,
    facts_of,
    make_stage,
    rank_command,
    start_rank,
)
from benchmarks.inputs.preference_inputs import (  # noqa: E402
    MAX_PROMPT,
    find_pairs,
    write_inputs,
    write_reward_model,
)
from benchmarks.inputs.preference_turns import VARIABLE, is_installed  # noqa: E402
from benchmarks.inputs.run_inputs import find_tokenizer, place_of_ranks  # noqa: E402
from benchmarks.inputs.turns import RankGroup, Turns, median_rate, take_turns  # noqa: E402

PPO_VARIABLE = "KUROSHIO_PEERS_PPO_PYTHON"
OURS = {  # engine and ranks
    "ours-zero2": ("zero2", 1),
    "ours-zero3": ("zero3", 1),
    "ours-zero2x2": ("zero2", 2),
    "ours-zero3x2": ("zero3", 2),
}
VARIABLES = {"trl": VARIABLE, "llamafactory": PPO_VARIABLE}
VARIANTS = (*OURS, "bare", *VARIABLES)


def main() -> None:
    """Compare the variants and print what came of it; or be a rank of ours."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--data", type=Path, help="a file of pairs, for its prompts")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--rank", help=argparse.SUPPRESS)  # a variant, as JSON
    args = parser.parse_args()
    if args.rank:
        run_rank(json.loads(args.rank))
        return
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        case = write_case(args, Path(folder))
        for num_ranks in (1, 2):
            figures |= compare(args, case, num_ranks, Path(folder))
    if not figures:
        raise SystemExit("none of these variants can run here")
    describe(figures)
    options = {key: str(value) for key, value in vars(args).items()}
    print(json.dumps({"benchmark": "ppo", "options": options, "results": figures}))


def write_case(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the inputs; return what every variant is told."""
    from trainer.engine.engine import choose_precision

    tokenizer, pairs = find_tokenizer(args.tokenizer, folder), find_pairs(args.data)
    return {
        "stage": "ppo",
        "precision": choose_precision(args.precision),
        "num_prompts": args.prompts,
        "num_new_tokens": args.new_tokens,
        **write_inputs(pairs, args.prompts, tokenizer, folder, MAX_PROMPT),
        "reward_model": write_reward_model(folder),
    }


def compare(
    args: argparse.Namespace, case: dict[str, Any], num_ranks: int, folder: Path
) -> dict[str, dict[str, Any]]:
    """Return the figures of the variants of so many ranks that this machine can run."""
    with contextlib.ExitStack() as stack:
        groups = []
        for variant in args.variants:
            _, own_ranks = OURS.get(variant, ("", 1))
            command = command_for(variant, case, folder) if own_ranks == num_ranks else None
            if command is not None:
                environ = place_of_ranks(num_ranks)
                environ |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
                environ |= {"DISABLE_VERSION_CHECK": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
                groups.append(stack.enter_context(RankGroup(variant, command, environ, folder)))
        figures = take_turns(groups, args.turns)
        for group in groups:
            figures[group.name]["parts_s"] = parts(group.reports)
        return figures


def command_for(variant: str, case: dict[str, Any], folder: Path) -> list[str] | None:
    """Return the command that starts a variant; None, with the reason, if it cannot be."""
    if variant in OURS:
        engine, num_ranks = OURS[variant]
        values = our_values(case | {"engine": engine}, num_ranks, folder / variant)
        return rank_command(str(ROOT / "benchmarks" / "ppo.py"), values)
    file = folder / f"{variant}.json"
    file.write_text(json.dumps(case | {"peer": variant, "out": str(folder / variant)}))
    inputs = ROOT / "benchmarks" / "inputs"
    if variant == "bare":
        return [sys.executable, str(inputs / "bare_ppo.py"), str(file)]
    python = os.environ.get(VARIABLES[variant])
    if not python or not is_installed(python, variant):
        why = f"is not installed in {python}" if python else f"{VARIABLES[variant]} is not set"
        print(f"{variant}: left out, {why}; see the beginning of benchmarks/ppo.py")
        return None
    return [python, str(inputs / "ppo_peers.py"), str(file)]


def our_values(case: dict[str, Any], num_ranks: int, run_dir: Path) -> dict[str, Any]:
    """Return the config of one of our variants; its prompts are prepared."""
    from launch.compose import compose_values
    from trainer.config import load_config
    from trainer.data.prepared.prepare import ensure_prepared

    overrides = [
        *common_overrides(case, run_dir),
        f"+data.sources.prompts.paths=['{case['pairs']}']",
        f"data.max_length={MAX_PROMPT}",
        f"cluster.gpus_per_node={num_ranks}",
        f"loop.micro_batch_size={case['num_prompts'] // num_ranks}",
        f"stage.rollouts_per_step={case['num_prompts']}",
        f"stage.sampling.max_new_tokens={case['num_new_tokens']}",
        f"+stage.rewards.judge={{kind: model, path: '{case['reward_model']}'}}",
        "stage.update.epochs=1",
        "stage.update.num_minibatches=1",
    ]
    values = compose_values(overrides)
    ensure_prepared(load_config(values).data, Path(case["model"]))
    return values


def parts(reports: list[list[dict[str, Any]]]) -> dict[str, float]:
    """Return the median seconds of a round's parts on the first rank; what is left is update."""
    rounds = [turn[0] for turn in reports]
    split = {
        part: statistics.median(report["seconds"].get(part, 0.0) for report in rounds)
        for part in ("rollout", "score")
    }
    rest = [report["wall_s"] - sum(report["seconds"].values()) for report in rounds]
    return split | {"update": statistics.median(rest)}


def describe(figures: dict[str, dict[str, Any]]) -> None:
    """Print the table; add ours as multiples of the others' speed."""
    some = next(iter(figures.values()))
    print(f"{some['precision']} on {some['device']}; load average {os.getloadavg()[0]:.1f}")
    for name, own in figures.items():
        own["round_s"] = statistics.median(own["turn_wall_s"])
        split = ", ".join(f"{part} {seconds:.2f}" for part, seconds in own["parts_s"].items())
        own["round_cpu_s"] = statistics.median(own["turn_cpu_s"])
        print(
            f"{name:13} {own['round_s']:6.2f} s a round ({split}), {own['round_cpu_s']:.2f} s of "
            f"processor time, peak {own['peak_mb']:.0f} MB"
        )
    for name, own in figures.items():
        if name.startswith("ours"):
            own["rate_of"] = {
                other: median_rate(f["turn_wall_s"], own["turn_wall_s"])
                for other, f in figures.items()
            }
            ratios = (f"{rate:.2f} × {other}" for other, rate in own["rate_of"].items())
            print(f"{name}: {', '.join(ratios)}")


def run_rank(case: dict[str, Any]) -> None:
    """Run the stage under the real loop until the parent has seen enough."""
    from trainer.stages.ppo import Ppo

    class TurnByTurn(Ppo):
        def train_step(self, step: int, batches: Iterator[Any]) -> int:
            turns.begin_step(step, self.facts)
            turns.targets += self.rollouts_per_step // context.world_size
            num_tokens = super().train_step(step, batches)
            turns.tokens += num_tokens
            return num_tokens

        def facts(self) -> dict[str, Any]:
            journal = (context.run_dir / "metrics.jsonl").read_text().splitlines()
            last = [r for r in map(json.loads, journal) if r["split"] == "train"][-1]
            seconds = {part: last[f"{part}_seconds"] for part in ("rollout", "score")}
            return facts_of(context, self.policy, device) | {"seconds": seconds}

    context, device = start_rank(case)
    turns = Turns(1, device)
    make_stage(TurnByTurn, context).run(context)


if __name__ == "__main__":
    main()
