"""The Tang-poem homework: given a poem's first couplet, write the rest.

    python benchmarks/long/tang.py --data-root ../shared/data

Not part of ``make bench``: about twenty minutes on two CPU cores. Examined poems are taken out of
all training text; then a tokenizer and a small LLaMA from scratch on Tang poems
(experiment=tang_base), tuning (experiment=tang_poem), and answers to the homework's 15 test rows
and to 500 held-out ones, before and after, greedily and at several temperatures and top_p. What is
done is not done again by a second call. Prints tables, writes a plot, and ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.inputs.poem_scores import bounds, learn_rhymes, plot, score, table  # noqa: E402
from benchmarks.inputs.tang_poems import Row, write_tang_files  # noqa: E402

if TYPE_CHECKING:
    from trainer.inference.chat_model import ChatModel

VOCAB_SIZE = 10240  # the poems have 9,000 different characters
TEMPERATURES = (0.0, 0.3, 0.5, 0.7, 0.85, 1.0, 1.2)
TOP_PS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
ROWS_AT_ONCE = 64
MAX_NEW_TOKENS = 120


def main() -> None:
    """Run everything below ``--out`` and print what it did."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", default="../shared/data", help="folder with the real data")
    parser.add_argument("--out", type=Path, default=Path("runs/tang"))
    parser.add_argument("--plot", type=Path, help="default: OUT/decoding.svg")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of both training runs")
    options = parser.parse_args()
    os.chdir(ROOT)
    start, out = time.time(), options.out
    counts = prepare(Path(options.data_root), out)
    train(options.data_root, out, options.set)
    rows = {name: read_rows(out / f"data/{name}.json") for name in ("test", "held_out")}
    answers = answer_all(out, rows)
    rhymes = learn_rhymes(out / "data/poems.jsonl")
    scores: dict[str, Any] = {}
    for name, own in rows.items():
        scores[name] = bounds(own, rhymes)
        scores[name] |= {way: score(own, said, rhymes) for way, said in answers[name].items()}
        print(f"\n{name}, {len(own)} rows, %:\n\n{table(scores[name])}")
    show_answers(rows["test"], answers["test"])
    path = options.plot or out / "decoding.svg"
    plot(scores["held_out"], path)
    print(f"\nplot {path}; {time.time() - start:.0f} s\n")
    print(json.dumps({"counts": counts, "scores": scores}))


def prepare(data_root: Path, out: Path) -> dict[str, int]:
    """Write the texts without examined poems and train the tokenizer on them; return counts."""
    from tokenizer.load import save_tokenizer
    from tokenizer.train import train_base

    counts = out / "data/counts.json"
    if not counts.exists():
        counts_now = write_tang_files(data_root, out / "data")
        counts.write_text(json.dumps(counts_now), "utf-8")
    if not (out / "tokenizer").exists():
        with (out / "data/poems.jsonl").open(encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line in file]
        save_tokenizer(train_base(texts, VOCAB_SIZE), out / "tokenizer")
    result: dict[str, int] = json.loads(counts.read_text("utf-8"))
    print("data: " + ", ".join(f"{name} {count:,}" for name, count in result.items()))
    return result


def train(data_root: str, out: Path, overrides: Sequence[str]) -> None:
    """Train and export the base and the tuned model."""
    shared = [f"data_root={data_root}", f"data.store_dir={out}/store", *overrides]
    base = [f"tokenizer.path={out}/tokenizer", f"data.sources.text.paths=[{out}/data/poems.jsonl]"]
    kuroshio("run", "experiment=tang_base", *shared, *base, f"run_dir={out}/base")
    export(out / "base", out / "base_model")
    tuned = [f"model.path={out}/base_model", f"data.sources.tang.paths=[{out}/data/train.json]"]
    kuroshio("run", "experiment=tang_poem", *shared, *tuned, f"run_dir={out}/tuned")
    export(out / "tuned", out / "model")


def kuroshio(*words: str) -> None:
    """Run one command; its failure ends the script."""
    print(f"$ kuroshio {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "launch", *words], check=True)


def export(run: Path, model: Path) -> None:
    """Export a run once, in fp32: greedy answers do not depend on the processor's bf16."""
    if not model.exists():
        kuroshio("export", str(run), str(model), "--dtype", "fp32")


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a JSON list."""
    rows: list[Row] = json.loads(path.read_text("utf-8"))
    return rows


def ways() -> Iterator[tuple[str, str, dict[str, float]]]:
    """Yield each way to answer: its name, the model's folder, the decoding parameters."""
    yield "base, as a text", "base_model", {"temperature": 0.0}
    yield "base, asked", "base_model", {"temperature": 0.0}
    for temperature in TEMPERATURES:
        yield f"temperature={temperature:g}", "model", {"temperature": temperature, "top_p": 1.0}
    for top_p in TOP_PS:
        yield f"top_p={top_p:g}", "model", {"temperature": 1.0, "top_p": top_p}


def answer_all(out: Path, rows: dict[str, list[Row]]) -> dict[str, dict[str, list[str]]]:
    """Return the answers by set of rows and way; those of an earlier call are read."""
    from trainer.inference.loading import Loading, load_chat_model

    models: dict[str, ChatModel] = {}
    answers: dict[str, dict[str, list[str]]] = {name: {} for name in rows}
    for way, folder, decoding in ways():
        for name, own in rows.items():
            path = out / "answers" / f"{name}, {way}.json"
            if not path.exists():
                if folder not in models:
                    loading = Loading(template="plain", precision="fp32")
                    models[folder] = load_chat_model(out / folder, loading)
                start = time.time()
                said = answer_rows(models[folder], own, decoding, asked=way != "base, as a text")
                print(f"{name}, {way}: {time.time() - start:.0f} s", flush=True)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(said, ensure_ascii=False), "utf-8")
            answers[name][way] = json.loads(path.read_text("utf-8"))
    return answers


def answer_rows(
    model: ChatModel, rows: Sequence[Row], decoding: dict[str, Any], asked: bool
) -> list[str]:
    """Return one answer per row.

    Args:
        model: base or tuned.
        rows: questions in Alpaca's form.
        decoding: parameters that differ from the default.
        asked: as the chat template asks; otherwise the couplet stands as the beginning of a text
            of the pretraining's kind, title and author before it, and the poem's end ends it.
    """
    from trainer.data.chats.conversation import Message
    from trainer.inference.decoding import Decoding

    prompts: list[list[int]] = []
    for row in rows:
        question = f"{row['instruction']}\n{row['input']}"
        text = f"無題\n佚名\n{row['input']}\n"
        asking = [Message("user", question)]
        prompts.append(model.prompt_ids(asking) if asked else model.tokenizer(text).input_ids)
    parameters = Decoding(max_new_tokens=MAX_NEW_TOKENS, **decoding)
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    said = [""] * len(rows)
    for start in range(0, len(order), ROWS_AT_ONCE):
        batch = order[start : start + ROWS_AT_ONCE]
        texts = model.answer([prompts[i] for i in batch], parameters, [str(i) for i in batch])
        for i, answer in zip(batch, texts, strict=True):
            said[i] = answer.text.strip()
    return said


def show_answers(rows: Sequence[Row], answers: dict[str, list[str]]) -> None:
    """Print the test rows with what the base and the tuned model write, greedily."""
    for i, row in enumerate(rows):
        print(f"\n{row['input']}\n  true   {row['output']}")
        print(f"  base   {answers['base, as a text'][i]!r}")
        print(f"  tuned  {answers['temperature=0'][i]!r}")


if __name__ == "__main__":
    main()
