"""Learning from preferences on HH-RLHF's harmless pairs, with a small English model.

    python benchmarks/long/hh.py --data-root ../shared/data

Not part of ``make bench``. A tokenizer and a small LLaMA from scratch (experiment=hh_base), tuned
on the chosen answers (experiment=hh_sft), then a reward model (experiment=hh_reward), and PPO paid
by it on three seeds (experiment=hh_ppo). The held-out quarter of the prompts is in none of the
training texts, which is checked. What is done is not done again by a second call. Prints tables,
writes plots, and ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.inputs.dpo_figures import tabulate_dpo  # noqa: E402
from benchmarks.inputs.hh_figures import (  # noqa: E402
    held_out,
    plot_reward,
    read_records,
    tabulate_reward,
)
from benchmarks.inputs.hh_texts import (  # noqa: E402
    find_leaks,
    read_answers,
    read_texts,
    write_hh_files,
)
from benchmarks.inputs.ppo_figures import plot_ppo, tabulate_ppo  # noqa: E402
from benchmarks.inputs.word_judge import judge_by_words, prefer_shorter  # noqa: E402

VOCAB_SIZE = 6144
NUM_SEEDS = 3  # of PPO, whose rewards differ from run to run


def main() -> None:
    """Run everything below ``--out`` and print what it did."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/hh"))
    parser.add_argument("--set", nargs="*", default=[], help="overrides of every training run")
    options = parser.parse_args()
    os.chdir(ROOT)
    start, out = time.time(), options.out
    shared = [f"data_root={options.data_root}", f"data.store_dir={out}/store", *options.set]
    counts = prepare(options.data_root, out)
    tune(out, shared)
    results = {"counts": counts, "reward": rank(out, shared), "rules": judge(options.data_root)}
    results["dpo"] = prefer(out, shared)
    results["ppo"] = reinforce(out, shared)
    print(f"\n{time.time() - start:.0f} s\n")
    print(json.dumps(results))


def prepare(data_root: Path, out: Path) -> dict[str, int]:
    """Write the texts without held-out prompts, train the tokenizer on them; return counts."""
    from tokenizer.load import save_tokenizer
    from tokenizer.train import train_base

    path, data = out / "data/counts.json", out / "data"
    if not path.exists():
        counts = write_hh_files(data_root, data)
        path.write_text(json.dumps(counts), "utf-8")
    texts = list(read_texts(data_root, data))
    if leaks := find_leaks(read_answers(data_root)[1], texts):
        raise SystemExit(f"{len(leaks)} held-out dialogues are in training texts: {leaks[:3]}")
    if not (out / "tokenizer").exists():
        save_tokenizer(train_base(texts, VOCAB_SIZE), out / "tokenizer")
    found: dict[str, int] = json.loads(path.read_text("utf-8"))
    print("data: " + ", ".join(f"{name} {count:,}" for name, count in found.items()))
    return found


def tune(out: Path, shared: list[str]) -> None:
    """Train and export the base and the tuned model."""
    dialogues = [f"data.sources.dialogues.paths=[{out}/data/dialogues.jsonl]"]
    instructions = [f"data.sources.instructions.paths=[{out}/data/alpaca.json]"]
    start = [f"tokenizer.path={out}/tokenizer", *dialogues, *instructions]
    kuroshio("run", "experiment=hh_base", *shared, *start, f"run_dir={out}/base")
    export(out / "base", out / "base_model")
    chosen = [f"data.sources.chosen.paths=[{out}/data/chosen.jsonl]", *instructions]
    start = [f"model.path={out}/base_model", *chosen]
    kuroshio("run", "experiment=hh_sft", *shared, *start, f"run_dir={out}/sft")
    export(out / "sft", out / "sft_model")


def rank(out: Path, shared: list[str]) -> dict[str, Any]:
    """Train and export the reward model; return its held-out figures."""
    run = out / "reward"
    start = [f"model.path={out}/sft_model", f"run_dir={run}"]
    kuroshio("run", "experiment=hh_reward", *shared, *start)
    export(run, out / "reward_model")
    kuroshio("report", str(run))
    plot_reward(run, out / "reward.svg")
    rows = held_out(run)
    last = read_records(run, "train")[-1]
    print(f"\nreward model, {rows[-1]['num_pairs']} held-out pairs:\n\n{tabulate_reward(rows)}")
    print(f"\ntraining accuracy at the end {last['accuracy']:.1%}; plot {out}/reward.svg")
    return {"held_out": rows, "train": last}


def prefer(out: Path, shared: list[str]) -> dict[str, Any]:
    """Train and export a policy by DPO; return its held-out figures."""
    run = out / "dpo"
    kuroshio("run", "experiment=hh_dpo", *shared, f"model.path={out}/sft_model", f"run_dir={run}")
    export(run, out / "dpo_model")
    kuroshio("report", str(run))
    plot_reward(run, out / "dpo.svg")
    rows = held_out(run)
    print(f"\nDPO, {rows[-1]['num_pairs']} held-out pairs:\n\n{tabulate_dpo(rows)}")
    print(f"\nplot {out}/dpo.svg")
    return {"held_out": rows, "train": read_records(run, "train")[-1]}


def reinforce(out: Path, shared: list[str]) -> dict[str, Any]:
    """Train by PPO on three seeds, export the first policy; return all held-out figures."""
    from trainer.metrics.history import load_run

    runs = [out / f"ppo_{seed}" for seed in range(NUM_SEEDS)]
    judge = f"stage.rewards.judge.path={out}/reward_model"
    start = [f"model.path={out}/sft_model", f"stage.critic={out}/reward_model", judge]
    for seed, run in enumerate(runs):
        own = [f"loop.seed={seed}", f"run_dir={run}"]
        kuroshio("run", "experiment=hh_ppo", *shared, *start, *own)
        kuroshio("report", str(run))
    export(runs[0], out / "ppo_model")
    target = float(load_run(runs[0]).config["stage"]["kl"]["target"])
    plot_ppo(runs, target, out / "ppo.svg")
    print(f"\nPPO, mean of steps at the start → at the end:\n\n{tabulate_ppo(runs)}")
    return {run.name: held_out(run) for run in runs}


def judge(data_root: Path) -> dict[str, dict[str, float]]:
    """Return what simple rules reach on the held-out pairs: what a reward model must beat."""
    from trainer.metrics.pairwise import wilson_interval

    train, held_out = read_answers(data_root)
    counts = {"words": judge_by_words(train, held_out), "shorter": prefer_shorter(held_out)}
    found = {}
    for name, num_right in counts.items():
        low, high = wilson_interval(num_right, len(held_out))
        found[name] = {"accuracy": num_right / len(held_out), "low": low, "high": high}
        print(f"{name}: {num_right / len(held_out):.1%} ({low:.1%} to {high:.1%})")
    return found


def kuroshio(*words: str) -> None:
    """Run one command; its failure ends the script."""
    print(f"$ kuroshio {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "launch", *words], check=True)


def export(run: Path, model: Path) -> None:
    """Export a run once, in fp32: figures then do not depend on the processor's bf16."""
    if not model.exists():
        kuroshio("export", str(run), str(model), "--dtype", "fp32")


if __name__ == "__main__":
    main()
