"""The main job on two CPU ranks and the texts of this folder; ``make demo`` runs it.

A tokenizer and a small LLaMA from scratch on English, the vocabulary extended with Chinese,
continued pretraining with English replay, an export that plain transformers loads, and a table of
what each step did. DEMO_DIR (default runs/demo) keeps everything; a second call resumes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

COMMON = [
    "data=samples",
    "engine=zero2",
    "cluster.gpus_per_node=2",
    "data.max_length=256",
    "loop.micro_batch_size=8",
    "loop.global_batch_tokens=8192",
    "optim.lr=3e-3",
    "schedule.warmup_steps=5",
    "loop.log_every=5",
]


def main() -> None:
    """Run the steps one after another; each is a command that a user would type."""
    start = time.time()
    os.chdir(ROOT)
    out = Path(os.environ.get("DEMO_DIR", "runs/demo"))
    store = f"data.store_dir={out}/store"
    make_base_tokenizer(out / "base_tokenizer")
    base = [
        *COMMON,
        store,
        "model=tiny",
        f"tokenizer.path={out}/base_tokenizer",
        f"run_dir={out}/base",
    ]
    # Chinese has no weight here: it is measured, not trained.
    base += ["data.sources.zh_tw.weight=0", "loop.max_steps=80", "stage.sample_prompts=[The]"]
    kuroshio("run", "stage=pretrain", *base)
    export(out / "base", out / "base_model")
    extension = ["data=samples", "model=folder", f"model.path={out}/base_model"]
    extension += ["data.sources.en.weight=0", "stage.vocab_size=1600", f"run_dir={out}/vocab"]
    kuroshio("run", "stage=vocab", *extension)
    continued = [*COMMON, store, "model=folder", f"model.path={out}/vocab/model"]
    continued += ["loop.max_steps=120", "loop.eval_every=40", "loop.save_every=40"]
    continued += ['stage.sample_prompts=["春天","The"]', f"run_dir={out}/continued"]
    kuroshio("run", "stage=pretrain", *continued)
    export(out / "continued", out / "model")
    kuroshio("report", str(out / "continued"))
    show_table(out)
    print(f"\n春天 → {generate(out / 'model', '春天')}")
    print(f"The → {generate(out / 'model', 'The')}")
    print(f"\nreport  {out / 'continued' / 'report.html'}\naudit   {out / 'vocab' / 'audit.html'}")
    print(f"model   {out / 'model'}\ntotal   {time.time() - start:.0f} s")


def kuroshio(*words: str) -> None:
    """Run one command, shown as typed; its failure ends the demo with its exit code."""
    print(f"\n$ kuroshio {' '.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "launch", *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def make_base_tokenizer(folder: Path) -> None:
    """Train the base model's tokenizer on the English texts."""
    from tokenizer.load import save_tokenizer
    from tokenizer.train import train_base

    if not folder.exists():
        lines = (ROOT / "samples/en.jsonl").read_text(encoding="utf-8").splitlines()
        model = train_base((json.loads(line)["text"] for line in lines), vocab_size=700)
        save_tokenizer(model, folder)


def export(run: Path, out: Path) -> None:
    """Export a run once."""
    if not out.exists():
        kuroshio("export", str(run), str(out), "--dtype", "fp32")


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """Return the figures by source of every evaluation of a run."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [record["sources"] for record in records if record["split"] == "eval"]


def show_table(out: Path) -> None:
    """Print what the steps did to each source, on its held-out documents."""
    from rich.console import Console
    from rich.table import Table

    base, continued = read_evaluations(out / "base"), read_evaluations(out / "continued")
    table = Table(title="Held-out documents, before and after")
    for column in ("source", "tokens per character", "bits per character: base"):
        table.add_column(column)
    table.add_column("vocabulary extended")
    table.add_column("continued pretraining")
    for source in ("zh_tw", "en"):
        first, extended, last = base[-1][source], continued[0][source], continued[-1][source]
        density = [f["num_tokens"] / f["num_chars"] for f in (first, last)]
        bits = [f"{f['bits_per_character']:.3f}" for f in (first, extended, last)]
        table.add_row(source, f"{density[0]:.2f} → {density[1]:.2f}", *bits)
    Console(width=110).print("\n", table)


def generate(folder: Path, prompt: str) -> str:
    """Return a line written by the exported model in plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(out[0], skip_special_tokens=True)


if __name__ == "__main__":
    main()
