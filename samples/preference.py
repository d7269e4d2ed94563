"""Generate ``manners_zh_tw.jsonl``, ``preference_zh_tw.jsonl`` and ``preference_zh_tw_test.jsonl``.

Usage: ``python samples/preference.py`` writes the three files beside this one; the result is the
same on every machine.

The questions are the single ones of ``chat_zh_tw.grammar`` behind a few words (``LEADS``), the
answers its answers, said with better or worse manners: a greeting before, a courtesy after, both
or neither. All answers are right; what is preferred is the one with both.

- ``manners_zh_tw.jsonl``: conversations for fine-tuning; one answer in five has both;
- ``preference_zh_tw.jsonl``: pairs of answers to other questions, ``prompt``, ``chosen`` (both) and
  ``rejected`` (one or neither);
- ``preference_zh_tw_test.jsonl``: questions of neither file, with ``check``, the rule of a right
  answer.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

from chat import read_grammar, write_conversation  # noqa: E402
from generate import Dice, Kind  # noqa: E402

# The files, what their names begin with, and how many rows they have.
NUM_ROWS = {"manners": 600, "preference": 640, "preference_test": 120}
SURPLUS = 3  # so many questions are drawn for each that is used
LEADS = ("請教一下，", "不好意思，", "打擾一下，", "麻煩你，")
GREETING, COURTESY = "您好，", "，很高興為您服務"
BOTH = (True, True)
NEITHER = (False, False)
ONE_OF_THEM = ((True, False), (False, True))
# What people say and what they get to compare; each entry is as likely as the others.
SPOKEN = (BOTH, BOTH, *ONE_OF_THEM, *[NEITHER] * 6)
WORSE = (*ONE_OF_THEM, NEITHER, NEITHER)

Row = dict[str, Any]


def write_questions() -> Iterator[Row]:
    """Yield rows of ``question``, ``answer`` and ``check``, all with different questions."""
    grammar, dice, seen = read_grammar(), Dice("kuroshio preference"), set[str]()
    kinds = [kind for kind in grammar.kinds if is_single(kind)]
    while True:
        for kind in kinds:
            row = write_conversation(kind, grammar, dice)
            user, assistant = (message["content"] for message in row["messages"])
            question = LEADS[dice.below(len(LEADS))] + user
            if question not in seen:
                seen.add(question)
                yield {"question": question, "answer": assistant, "check": row["check"]}


def is_single(kind: Kind) -> bool:
    """Say whether a kind of conversation is one question and its answer."""
    return [line.partition(":")[0] for line in kind.sentences] == ["user", "assistant", "check"]


def say(answer: str, manners: tuple[bool, bool]) -> str:
    """Say an answer with or without a greeting and a courtesy."""
    greeting, courtesy = manners
    plain = answer.removesuffix("。")
    return f"{GREETING if greeting else ''}{plain}{COURTESY if courtesy else ''}。"


def is_courteous(answer: str) -> bool:
    """Say whether an answer has both, once each, and something between them."""
    match = re.fullmatch(f"{GREETING}(.+){COURTESY}。", answer.strip())
    return match is not None and GREETING not in match[1] and COURTESY not in match[1]


def is_right(row: Row, answer: str) -> bool:
    """Say whether an answer to a test row is right, whatever its manners."""
    plain = answer.strip().removeprefix(GREETING).removesuffix("。").removesuffix(COURTESY) + "。"
    return re.fullmatch(row["check"], plain) is not None


def read_test_rows() -> list[Row]:
    """Return the rows of the test file."""
    with (FOLDER / "preference_zh_tw_test.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def generate() -> dict[str, str]:
    """Return the JSON-lines files by name."""
    dice, writers = Dice("kuroshio manners"), (spoken, compared, asked)
    questions: dict[str, list[Row]] = {name: [] for name in NUM_ROWS}
    for row in islice(write_questions(), SURPLUS * sum(NUM_ROWS.values())):
        questions[part_of(row["question"])].append(row)
    files = {}
    for (name, number), write in zip(NUM_ROWS.items(), writers, strict=True):
        rows = [write(row, dice) for row in questions[name][:number]]
        files[file_name(name)] = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    return files


def file_name(part: str) -> str:
    """Return the name of a part's file: preference_test's is preference_zh_tw_test.jsonl."""
    subject, _, rest = part.partition("_")
    return f"{subject}_zh_tw{'_' if rest else ''}{rest}.jsonl"


def part_of(question: str) -> str:
    """Return which file a question belongs to; a function of its words alone."""
    share = hashlib.sha256(question.encode()).digest()[0] % 10
    return "preference_test" if share == 0 else "manners" if share < 5 else "preference"


def spoken(row: Row, dice: Dice) -> Row:
    """Return a conversation."""
    content = say(row["answer"], SPOKEN[dice.below(len(SPOKEN))])
    asked_for = {"role": "user", "content": row["question"]}
    return {"messages": [asked_for, {"role": "assistant", "content": content}]}


def compared(row: Row, dice: Dice) -> Row:
    """Return a pair of answers."""
    worse = say(row["answer"], WORSE[dice.below(len(WORSE))])
    return {"prompt": row["question"], "chosen": say(row["answer"], BOTH), "rejected": worse}


def asked(row: Row, dice: Dice) -> Row:
    """Return a question and the rule of its answer."""
    return {"prompt": row["question"], "check": row["check"]}


def main() -> None:
    """Write the files."""
    for name, text in generate().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
