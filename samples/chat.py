"""Generate the conversations of ``chat_zh_tw.jsonl`` and ``chat_zh_tw_test.jsonl``.

Usage: ``python samples/chat.py`` writes both files beside this one; the result is the same on every
machine.

The notation of ``chat_zh_tw.grammar`` is that of ``generate.py``, whose Chinese tables it may use;
``=kind`` starts a kind of conversation, whose lines are its messages: ``system: …``, ``user: …``,
``assistant: …``, and last ``check: …``, a regular expression that matches a right final answer as a
whole. One conversation in ten is kept for the test file, by what stands before its final answer, so
no question is in both files in the same words. Training rows are ``{"messages": […]}``; test rows
have ``kind`` and ``check`` as well.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

from generate import Dice, Grammar, Kind, choose, draw, fill, parse  # noqa: E402

NUM_CONVERSATIONS = 2400  # of both files together
TEST_SHARE = 10  # one in so many
MAX_REPEATS = 200  # draws in a row without a new conversation: the kind is used up

Row = dict[str, Any]


def read_grammar() -> Grammar:
    """Read the conversations' grammar, with the tables of the Chinese texts."""
    grammar = parse((FOLDER / "chat_zh_tw.grammar").read_text(encoding="utf-8"))
    texts = parse((FOLDER / "zh_tw.grammar").read_text(encoding="utf-8"))
    grammar.tables = texts.tables | grammar.tables
    return grammar


def write_conversation(kind: Kind, grammar: Grammar, dice: Dice) -> Row:
    """Write one conversation of a kind: ``messages``, ``kind``, ``check``."""
    bindings = draw(kind, grammar, dice)
    row: Row = {"messages": [], "kind": kind.name}
    for line in kind.sentences:
        role, _, sentence = line.partition(": ")
        content = fill(choose(sentence, dice), bindings, "zh_tw")
        if role == "check":
            row["check"] = content
        else:
            row["messages"].append({"role": role, "content": content})
    return row


def write_conversations(grammar: Grammar) -> Iterator[Row]:
    """Yield conversations, all with different questions, the kinds in turn."""
    dice, seen = Dice("kuroshio chat"), set[str]()
    kinds = list(grammar.kinds)
    while kinds:
        for kind in list(kinds):
            for _ in range(MAX_REPEATS):
                row = write_conversation(kind, grammar, dice)
                if question(row) not in seen:
                    seen.add(question(row))
                    yield row
                    break
            else:
                kinds.remove(kind)


def question(row: Row) -> str:
    """Return what stands before the final answer, as one text."""
    return json.dumps(row["messages"][:-1], ensure_ascii=False)


def is_test(row: Row) -> bool:
    """Say whether a conversation belongs to the test file; a function of its question alone."""
    digest = hashlib.sha256(question(row).encode()).digest()
    return digest[0] % TEST_SHARE == 0


def is_right(row: Row, answer: str) -> bool:
    """Say whether an answer to a test row is right, by the row's rule."""
    return re.fullmatch(row["check"], answer.strip()) is not None


def read_test_rows() -> list[Row]:
    """Return the rows of the test file."""
    with (FOLDER / "chat_zh_tw_test.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def generate() -> tuple[str, str]:
    """Return both JSON-lines files: training, test."""
    rows: list[Row] = []
    for row in write_conversations(read_grammar()):
        rows.append(row)
        if len(rows) == NUM_CONVERSATIONS:
            break
    train = [{"messages": row["messages"]} for row in rows if not is_test(row)]
    test = [row for row in rows if is_test(row)]
    return _lines(train), _lines(test)


def _lines(rows: list[Row]) -> str:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    return "".join(Dice("order chat").shuffle(lines))


def main() -> None:
    """Write both files."""
    train, test = generate()
    (FOLDER / "chat_zh_tw.jsonl").write_text(train, encoding="utf-8")
    (FOLDER / "chat_zh_tw_test.jsonl").write_text(test, encoding="utf-8")


if __name__ == "__main__":
    main()
