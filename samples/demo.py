"""The main job on two CPU ranks and the texts of this folder; ``make demo`` runs it.

A tokenizer and a small LLaMA from scratch on English, the vocabulary extended with Chinese,
continued pretraining with English replay, fine-tuning on conversations, a reward model of which
answers are preferred, DPO and PPO from there, exports that plain transformers loads, and tables of
what each step did. The steps are those of conf/pipeline/demo.yaml (`kuroshio run pipeline=demo`),
the tables this script's. DEMO_DIR (default runs/demo) keeps everything; a second call resumes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from trainer.inference.chat_model import ChatModel

Chat = list[tuple[Any, str]]  # role and content

REPORTED = ("continued", "tuned", "reward", "dpo", "ppo")
# As the messages of a conversation, user first; a text before | is the system prompt.
SHOWN = [
    ["「黑」的反義詞是什麼？"],
    ["七加八等於多少？"],
    ["把「彩虹」倒過來說。"],
    ["用三個詞回答：有哪些夏天的水果？"],
    ["你是小潮，一個親切的小幫手|你叫什麼名字？"],
    ["花蓮在臺灣的哪裡？", "花蓮在臺灣的東部。", "那高雄呢？"],
]


def main() -> None:
    """Run the pipeline, write the reports of its runs, and show what each step did."""
    from launch import pipeline, report

    start = time.time()
    os.chdir(ROOT)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    out = Path(os.environ.get("DEMO_DIR", "runs/demo"))
    words = ["pipeline=demo", f"dir={out}"]
    print(f"$ kuroshio run {' '.join(words)}", flush=True)
    if code := pipeline.main(words):
        sys.exit(code)
    for run in REPORTED:
        report.main([str(out / run)])
    show_table(out)
    print(f"\n春天 → {generate(out / 'continued_model', '春天')}")
    print(f"The → {generate(out / 'continued_model', 'The')}")
    show_answers(out)
    show_preferences(out)
    for name, path in (
        ("reports", " ".join(f"{out}/{run}/report.html" for run in REPORTED)),
        ("audit", out / "vocab/audit.html"),
        ("model", out / "ppo_model"),
        ("talk", f"kuroshio chat {out}/ppo_model"),
    ):
        print(f"{name:8} {path}")
    print(f"total    {time.time() - start:.0f} s")


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


def show_answers(out: Path) -> None:
    """Print what the model answers before and after fine-tuning, and how often it is right."""
    from chat import read_test_rows
    from rich.console import Console
    from rich.table import Table

    from trainer.inference.loading import Loading, load_chat_model

    before = load_chat_model(out / "continued_model", Loading(template="chatml", precision="fp32"))
    after = load_chat_model(out / "chat_model", Loading(precision="fp32"))
    chats = [as_messages(turns) for turns in SHOWN]
    table = Table(title="Answers before and after fine-tuning", show_lines=True)
    for column in ("conversation", "before", "after"):
        table.add_column(column)
    for chat, *answers in zip(chats, answer(before, chats), answer(after, chats), strict=True):
        table.add_row("\n".join(f"{role}: {text}" for role, text in chat), *answers)
    Console(width=110).print("\n", table)
    rows = read_test_rows()
    scores = [f"{count_right(model, rows)} of {len(rows)}" for model in (before, after)]
    print(f"\nheld-out questions answered right, by rule: {' → '.join(scores)}")
    print(f"\nthe last conversation as the model reads it:\n{as_prompt(after, chats[-1])}")


def show_preferences(out: Path) -> None:
    """Print what DPO and PPO made of the fine-tuned model, on held-out questions."""
    from compare import compare
    from rich.console import Console
    from rich.table import Table

    models = {"SFT": "chat_model", "DPO": "dpo_model", "PPO": "ppo_model"}
    folders = {name: out / folder for name, folder in models.items()}
    figures = compare(folders, out / "reward_model")
    number = len(figures[0]["answers"])
    table = Table(title=f"{number} held-out questions, one answer drawn to each")
    for column in ("", "reward model's score", "wins against SFT by it, %", "by the rule, %"):
        table.add_column(column)
    for column in ("courteous, %", "right, %", "KL to SFT, nats an answer", "tokens"):
        table.add_column(column)
    for row in figures:
        shares = [f"{row[k]:.1f}" for k in ("wins_by_score", "wins_by_rule", "courteous", "right")]
        lengths = [f"{row[key]:.2f}" for key in ("kl_per_answer", "num_tokens")]
        table.add_row(row["model"], f"{row['score']:.2f}", *shares, *lengths)
    Console(width=110).print("\n", table)
    for row in figures:
        print(f"{row['model']}: {'  '.join(row['answers'][:4])}")


def as_messages(turns: list[str]) -> Chat:
    """Return a conversation of ``SHOWN`` as pairs of role and content."""
    system, bar, first = turns[0].rpartition("|")
    roles = ["user", "assistant"] * len(turns)
    spoken = list(zip(roles, [first, *turns[1:]], strict=False))
    return [("system", system), *spoken] if bar else spoken


def as_prompt(model: ChatModel, chat: Chat) -> str:
    """Return a conversation in the model's chat template."""
    messages = [{"role": role, "content": text} for role, text in chat]
    text = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return str(text)


def answer(model: ChatModel, chats: list[Chat]) -> list[str]:
    """Return the model's greedy answers, one line each."""
    from trainer.data.chats.conversation import Message
    from trainer.inference.decoding import Decoding

    greedy = Decoding(temperature=0, max_new_tokens=40)
    prompts = [model.prompt_ids([Message(role, text) for role, text in chat]) for chat in chats]
    answers = model.answer(prompts, greedy, [str(i) for i in range(len(prompts))])
    return [" ".join(each.text.split()) for each in answers]


def count_right(model: ChatModel, rows: list[dict[str, Any]]) -> int:
    """Return how many of the test rows the model answers as their rules demand."""
    from chat import is_right

    chats = [[(m["role"], m["content"]) for m in row["messages"][:-1]] for row in rows]
    return sum(map(is_right, rows, answer(model, chats)))


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
