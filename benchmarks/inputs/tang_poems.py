"""Tang poems for pretraining, tuning and two examinations, without a poem in two places.

The homework's 15 test poems and 500 of its 5,001 training poems are examinations. Nearly all of
them are in the pretraining text as well, so a poem leaves pretraining and tuning if it shares a
couplet with an examined one; equal titles or whole bodies would miss other readings and cycles.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.inputs.verses import clauses, couplets

NUM_HELD_OUT = 500
SEED = 20260101
LACUNA = "□"

Row = dict[str, Any]


def write_tang_files(data_root: Path, folder: Path) -> dict[str, int]:
    """Write ``poems.jsonl``, ``train.json``, ``held_out.json`` and ``test.json`` into ``folder``.

    Args:
        data_root: holds ``pretrain/tang_poems.jsonl.gz`` and ``sft/tang_hw5``.
        folder: made if need be.

    Returns:
        Counts of what was kept and removed.
    """
    homework = data_root / "sft" / "tang_hw5"
    rows: list[Row] = json.loads((homework / "Tang_training_data.json").read_text("utf-8"))
    test: list[Row] = json.loads((homework / "Tang_testing_data.json").read_text("utf-8"))
    truths = (homework / "Tang_testing_gt.txt").read_text("utf-8").splitlines()
    test = [row | {"output": write_truth(t)} for row, t in zip(test, truths, strict=True)]
    held_out = draw_held_out(rows, NUM_HELD_OUT)
    examined = set[str]().union(*(couplets(body(row)) for row in test + held_out))
    train = [row for row in rows if not couplets(body(row)) & examined]
    with gzip.open(data_root / "pretrain" / "tang_poems.jsonl.gz", "rt", encoding="utf-8") as file:
        poems = [json.loads(line)["text"] for line in file]
    kept, removed = split_poems(poems, examined)
    bodies = {"".join(body(row)) for row in test + held_out}
    folder.mkdir(parents=True, exist_ok=True)
    for name, own in (("train", train), ("held_out", held_out), ("test", test)):
        (folder / f"{name}.json").write_text(json.dumps(own, ensure_ascii=False), "utf-8")
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in kept)
    (folder / "poems.jsonl").write_text("".join(lines), "utf-8")
    return {
        "homework_rows": len(rows),
        "train": len(train),
        "train_removed": len(rows) - len(train),
        "held_out": len(held_out),
        "test": len(test),
        "poems": len(poems),
        "poems_removed": len(removed),
        "poems_removed_with_equal_body": sum("".join(verses(text)) in bodies for text in removed),
    }


def write_truth(line: str) -> str:
    """Return a line of the homework's answers, clauses between tabs, as verse with punctuation."""
    parts = line.split("\t")
    return "".join(part + ("，" if i % 2 == 0 else "。") for i, part in enumerate(parts))


def body(row: Row) -> list[str]:
    """Return the clauses of a row's whole poem."""
    return clauses(row["input"] + row["output"])


def verses(text: str) -> list[str]:
    """Return the clauses of a pretraining text, whose first two lines are title and author."""
    return clauses("".join(text.split("\n")[2:]))


def draw_held_out(rows: Sequence[Row], count: int) -> list[Row]:
    """Draw rows whose poems are whole, and that share no couplet with one another."""
    order = list(range(len(rows)))
    Random(SEED).shuffle(order)
    drawn: list[Row] = []
    seen = set[str]()
    for row in (rows[i] for i in order):
        own = couplets(body(row))
        if len(clauses(row["input"])) == 2 and LACUNA not in row["output"] and not own & seen:
            drawn.append(row)
            seen |= own
            if len(drawn) == count:
                return drawn
    raise ValueError(f"only {len(drawn)} of {count} rows can be held out")


def split_poems(poems: Iterable[str], examined: set[str]) -> tuple[list[str], list[str]]:
    """Return the texts without and with a couplet of ``examined``."""
    kept: list[str] = []
    removed: list[str] = []
    for text in poems:
        (removed if couplets(verses(text)) & examined else kept).append(text)
    return kept, removed
