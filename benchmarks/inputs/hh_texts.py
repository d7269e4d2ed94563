"""Texts and dialogues of HH-RLHF for pretraining and tuning, without a held-out prompt.

The pairs themselves are read from the file as it is; ``kuroshio prepare`` holds a share of them out
by the hash of the first question. The same rule keeps their dialogues away from what the base and
the tuned model read, so that no model has seen a prompt, or an answer, that the others are examined
on.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.data.chats.conversation import Message
from trainer.data.chats.transcripts import is_transcript, read_transcript
from trainer.data.prepared.store import hash_text

PAIRS = "preference/hh_rlhf/harmless-base_test_rows0000-1799.jsonl.gz"
ALPACA = "sft/stanford_alpaca/alpaca_5000.json"
WEB, WIKI = "pretrain/lf_c4_demo.jsonl", "pretrain/lf_wiki_demo.txt"
Answers = tuple[str, str]  # the chosen and the rejected one
HELD_OUT_SHARE = 0.25  # of conf/experiment/hh_reward.yaml


def write_hh_files(data_root: Path, folder: Path) -> dict[str, int]:
    """Write ``dialogues.jsonl`` (texts), ``chosen.jsonl`` and ``alpaca.json`` into ``folder``.

    Args:
        data_root: holds the pairs and the instructions.
        folder: made if need be.

    Returns:
        Counts of what was kept and left out.
    """
    with gzip.open(data_root / PAIRS, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    seen = [row for row in rows if not is_held_out(first_question(row["chosen"]))]
    texts = [row[side].strip() for row in seen for side in ("chosen", "rejected")]
    chats = [turns for row in seen if is_in_turns(turns := read_turns(row["chosen"]))]
    alpaca: list[dict[str, Any]] = json.loads((data_root / ALPACA).read_text("utf-8"))
    examined = {first_question(row["chosen"]) for row in rows if row not in seen}
    instructions = [r for r in alpaca if r["output"] and r["instruction"] not in examined]
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "dialogues.jsonl", [{"text": text} for text in dict.fromkeys(texts)])
    write_lines(folder / "chosen.jsonl", [{"messages": list(map(as_dict, own))} for own in chats])
    (folder / "alpaca.json").write_text(json.dumps(instructions, ensure_ascii=False), "utf-8")
    return {
        "pairs": len(rows),
        "pairs_held_out": len(rows) - len(seen),
        "dialogues": len(set(texts)),
        "tuning_dialogues": len(chats),
        "tuning_dialogues_left_out": len(seen) - len(chats),
        "instructions": len(instructions),
        "instructions_left_out": len(alpaca) - len(instructions),
    }


def is_held_out(question: str) -> bool:
    """Return whether ``kuroshio prepare`` holds a dialogue with this first question out."""
    return hash_text(question.encode()) < HELD_OUT_SHARE * 2.0**64


def first_question(transcript: str) -> str:
    """Return what a transcript's human says first."""
    return next((turn.content for turn in read_turns(transcript) if turn.role == "user"), "")


def read_turns(transcript: str) -> list[Message]:
    """Return the turns of a transcript, none of a text that is no transcript."""
    return read_transcript(transcript) if is_transcript(transcript) else []


def as_dict(turn: Message) -> dict[str, str]:
    """Return a turn as the layout ``messages`` has it."""
    return {"role": turn.role, "content": turn.content}


def is_in_turns(turns: Sequence[Message]) -> bool:
    """Return whether human and assistant take turns, each says something, and the latter ends."""
    order = ["user", "assistant"] * (len(turns) // 2)
    return [turn.role for turn in turns] == order and all(turn.content.strip() for turn in turns)


def read_texts(data_root: Path, folder: Path) -> Iterator[str]:
    """Yield all texts that base and tuned model are trained on."""
    for path in (data_root / WEB, folder / "dialogues.jsonl"):
        yield from (
            json.loads(line)["text"] for line in path.read_text("utf-8").split("\n") if line
        )
    yield from (data_root / WIKI).read_text("utf-8").split("\n")
    for row in json.loads((folder / "alpaca.json").read_text("utf-8")):
        yield "\n".join(value for value in row.values() if value)
    for line in (folder / "chosen.jsonl").read_text("utf-8").split("\n"):
        if line:
            yield "\n".join(turn["content"] for turn in json.loads(line)["messages"])


def read_answers(data_root: Path) -> tuple[list[Answers], list[Answers]]:
    """Return the last answers of the pairs that differ: those to train on, and those held out."""
    with gzip.open(data_root / PAIRS, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    sides: tuple[list[Answers], list[Answers]] = [], []
    for row in rows:
        chosen, rejected = (read_turns(row[side])[-1].content for side in ("chosen", "rejected"))
        if chosen.strip() and rejected.strip() and chosen != rejected:
            sides[is_held_out(first_question(row["chosen"]))].append((chosen, rejected))
    return sides


def find_leaks(pairs: Iterable[Answers], texts: Iterable[str]) -> list[str]:
    """Return the answers of 60 characters or more that stand in a text; shorter ones are common."""
    everything = "\x00".join(texts)
    answers = (answer.strip() for pair in pairs for answer in pair)
    return [answer for answer in answers if len(answer) >= 60 and answer in everything]


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON Lines."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), "utf-8")
