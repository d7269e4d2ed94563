"""Tune a small model on an Excel workbook, by LoRA and in full, and ask it before and after.

    python benchmarks/long/excel_qa.py --data-root ../shared/data

Not part of ``make bench``: about twenty minutes on two CPU cores. The workbook holds BELLE's 1,000
development questions, converted to Traditional Chinese, under the headers 問題 and 回答. The base
is a small LLaMA from scratch, with a tokenizer of its own, on transcripts of public meetings. What
is done is not done again by a second call. Prints tables and ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.inputs.workbook import write_workbook  # noqa: E402

ROWS = "sft/derived_tw/belle_dev1K_s2twp.json.gz"
TEXTS = "pretrain/archive_tw.jsonl.gz"
VOCAB_SIZE = 8000
TOKENIZER_CHARS = 2_000_000
QUESTIONS = (
    "請把下面的句子改寫得更有禮貌：把門關上。",
    "請列出三種常見的水果。",
    "小明有十二顆糖果，平均分給三個朋友，每個人有幾顆？",
    "請寫一句祝賀朋友生日的話。",
    "什麼是人工智慧？",
)
WAYS = {"lora": ["peft=lora"], "full": ["peft=full", "optim.lr=5e-4"]}


def main() -> None:
    """Run everything below ``--out`` and print what it did."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/excel_qa"))
    parser.add_argument("--set", nargs="*", default=[], help="overrides of every training run")
    options = parser.parse_args()
    os.chdir(ROOT)
    out = options.out
    counts = make_workbook(options.data_root, out / "belle.xlsx")
    shared = [f"data.store_dir={out}/store", *options.set]
    make_base(options.data_root, out, shared)
    workbook = f"data.sources.workbook.paths=[{out}/belle.xlsx]"
    tuning = ["experiment=excel_qa", *shared, workbook, f"model.path={out}/base_model"]
    kuroshio("prepare", "--check", *tuning, f"run_dir={out}/check")
    for way, own in WAYS.items():
        kuroshio("run", *tuning, *own, f"run_dir={out}/{way}")
        export(out / way, out / f"{way}_model")
    result = {"counts": counts, "held_out": show_figures(out), "answers": show_answers(out)}
    print(json.dumps(result, ensure_ascii=False))


def make_workbook(data_root: Path, path: Path) -> dict[str, int]:
    """Write the workbook and say what is in it."""
    with gzip.open(data_root / ROWS, "rt", encoding="utf-8") as file:
        rows = json.load(file)
    counts = write_workbook(rows, path)
    print(f"{path}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    return counts


def make_base(data_root: Path, out: Path, overrides: Sequence[str]) -> None:
    """Train and export the base, with a tokenizer of its own."""
    from tokenizer.load import save_tokenizer
    from tokenizer.train import TextSample, train_base

    if not (out / "tokenizer").exists():
        sample = TextSample(TOKENIZER_CHARS)
        with gzip.open(data_root / TEXTS, "rt", encoding="utf-8") as file:
            for line in file:
                sample.add(json.loads(line)["text"])
        save_tokenizer(train_base(sample.texts(), VOCAB_SIZE), out / "tokenizer")
    base = ["stage=pretrain", "data=files", "model=small", f"tokenizer.path={out}/tokenizer"]
    base += ["model.architecture.num_hidden_layers=6", f"run_dir={out}/base", *overrides]
    base += [f"data.sources.text.paths=[{data_root / TEXTS}]", "data.max_length=512"]
    base += ["optim.lr=2e-3", "schedule.warmup_steps=20", "cluster.gpus_per_node=2"]
    base += ["loop.max_steps=600", "loop.micro_batch_size=4", "loop.global_batch_tokens=4096"]
    kuroshio("run", *base, "loop.eval_chars=20000", "loop.log_every=20", "loop.save_every=100")
    export(out / "base", out / "base_model")


def kuroshio(*words: str) -> None:
    """Run one command; its failure ends the script."""
    print(f"$ kuroshio {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "launch", *words], check=True)


def export(run: Path, model: Path) -> None:
    """Export a run once; an adapter is merged."""
    if not model.exists():
        kuroshio("export", str(run), str(model), "--dtype", "fp32")


def show_figures(out: Path) -> dict[str, list[float]]:
    """Print and return bits per character of the held-out answers, before and after each way."""
    print("\n| way | bits per character before | after |\n|---|---|---|")
    figures: dict[str, list[float]] = {}
    for way in WAYS:
        lines = (out / way / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        evals = [record for record in map(json.loads, lines) if record["split"] == "eval"]
        bits = [record["sources"]["workbook"]["bits_per_character"] for record in evals]
        figures[way] = [bits[0], bits[-1]]
        print(f"| {way} | {bits[0]:.3f} | {bits[-1]:.3f} |")
    return figures


def show_answers(out: Path) -> dict[str, dict[str, str]]:
    """Print and return greedy answers to questions of our own, before and after."""
    from trainer.data.chats.conversation import Message
    from trainer.inference.decoding import Decoding
    from trainer.inference.loading import Loading, load_chat_model

    greedy = Decoding(temperature=0, max_new_tokens=60, repetition_penalty=1.1)
    answers: dict[str, dict[str, str]] = {question: {} for question in QUESTIONS}
    for name in ("base", *WAYS):
        model = load_chat_model(out / f"{name}_model", Loading(template="plain", precision="fp32"))
        prompts = [model.prompt_ids([Message("user", question)]) for question in QUESTIONS]
        for question, answer in zip(
            QUESTIONS, model.answer(prompts, greedy, QUESTIONS), strict=True
        ):
            answers[question][name] = " ".join(answer.text.split())
    for question, own in answers.items():
        print(f"\n{question}")
        for name, text in own.items():
            print(f"  {name:5} {text}")
    figures: dict[str, Any] = answers
    return figures


if __name__ == "__main__":
    main()
