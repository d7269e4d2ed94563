"""Held-out prompts of HH-RLHF are in no training text, and the store holds the same ones out."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.inputs.hh_texts import (
    PAIRS,
    find_leaks,
    first_question,
    is_held_out,
    is_in_turns,
    read_answers,
    read_texts,
    read_turns,
    write_hh_files,
)
from trainer.data.prepared.store import hash_text

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"


def transcript(question: str, answer: str) -> str:
    return f"\n\nHuman: {question}\n\nAssistant: Why?\n\nHuman: So.\n\nAssistant: {answer}"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Forty pairs, some of a question with another answer, and the other texts."""
    lines = []
    for number in range(40):
        question = f"question {number // 2}?"
        chosen, rejected = (f"{side} {number} " + "word " * 20 for side in ("good", "bad"))
        pair = {"chosen": transcript(question, chosen), "rejected": transcript(question, rejected)}
        lines.append(json.dumps(pair) + "\n")
    path = tmp_path / PAIRS
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(lines)
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain/lf_c4_demo.jsonl").write_text('{"text": "a page"}\n', "utf-8")
    (tmp_path / "pretrain/lf_wiki_demo.txt").write_text("an article\n", "utf-8")
    held_out = next(f"question {i}?" for i in range(20) if is_held_out(f"question {i}?"))
    rows = [{"instruction": i, "input": "", "output": "yes"} for i in ("bake bread", held_out)]
    (tmp_path / "sft/stanford_alpaca").mkdir(parents=True)
    (tmp_path / "sft/stanford_alpaca/alpaca_5000.json").write_text(json.dumps(rows), "utf-8")
    return tmp_path


def test_held_out_prompts_are_in_no_training_text(small: Path, tmp_path: Path) -> None:
    counts = write_hh_files(small, tmp_path / "data")
    assert counts["pairs"] == 40 and 0 < counts["pairs_held_out"] < 40
    assert counts["instructions_left_out"] == 1
    texts = list(read_texts(small, tmp_path / "data"))
    train, held_out = read_answers(small)
    assert len(held_out) == counts["pairs_held_out"] == 40 - len(train)
    assert find_leaks(held_out, texts) == [] and len(find_leaks(train, texts)) == 2 * len(train)
    leaked = held_out[3][1].strip()
    assert find_leaks([*held_out, ("short", "")], [*texts, leaked + " short"]) == [leaked]
    together = "\n".join(texts)
    assert "a page" in together and "an article" in together and "bake bread" in together
    questions = [f"question {i}?" for i in range(20)]
    assert [q in together for q in questions] == [not is_held_out(q) for q in questions]


def test_transcripts_are_read_as_the_store_reads_them() -> None:
    turns = read_turns("\n\nHuman: a \n\nAssistant: b\n\nc\n\nHuman:  d\n\nAssistant: e")
    said = [(turn.role, turn.content) for turn in turns]
    assert said == [("user", "a "), ("assistant", "b\n\nc"), ("user", " d"), ("assistant", "e")]
    assert is_in_turns(turns) and not is_in_turns(turns[:3]) and not is_in_turns(turns[1:3])
    assert first_question("\n\nHuman: a\n\nAssistant: b") == "a"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real data beside the repository")
def test_the_store_holds_the_same_pairs_out(tmp_path: Path, english_tokenizer: Path) -> None:
    from launch.compose import compose_config
    from trainer.data.prepared.prepare import ensure_prepared, open_store

    with gzip.open(SHARED / PAIRS, "rt", encoding="utf-8") as file:
        lines = list(islice(file, 100))
    with gzip.open(tmp_path / "pairs.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(lines)
    config = compose_config(
        ["experiment=hh_reward", f"data.sources.pairs.paths=[{tmp_path}/pairs.jsonl.gz]",
         f"data.store_dir={tmp_path}", "data.num_processes=1", "data.max_length=8192",
         "data.max_bad_row_share=0.1", f"model.path={english_tokenizer}"]
    )  # fmt: skip
    ensure_prepared(config.data, str(english_tokenizer))
    [source] = open_store(config.data, str(english_tokenizer)).sources.values()
    questions = [first_question(json.loads(line)["chosen"]) for line in lines]
    expected = sum(map(is_held_out, questions))
    num_rejected = len(lines) - len(source.num_chars)
    found = len(source.document_ids(held_out=True))
    assert num_rejected < 5 and expected - num_rejected <= found <= expected
    hashes = {hash_text(question.encode()) for question in questions}
    assert set(source.text_hashes.tolist()) <= hashes
