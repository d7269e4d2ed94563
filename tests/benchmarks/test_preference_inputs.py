"""What the benchmarks of preference learning start from, and how they sum up."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import byte_level_tokenizer

from benchmarks.inputs.preference_inputs import (
    Pair,
    as_sharegpt,
    choose_pairs,
    encode,
    read_pairs,
    read_transcript,
)
from benchmarks.inputs.preference_turns import rate_of
from benchmarks.ppo import parts
from trainer.data.chats.templates import read_builtin

HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        (f"{HUMAN}Hi{ASSISTANT}Hello", ["Hi", "Hello"]),
        (f"{HUMAN}a{ASSISTANT}b{HUMAN}c\nd{ASSISTANT}e", ["a", "b", "c\nd", "e"]),
        (f"{HUMAN}a{HUMAN}b{ASSISTANT}c", None),
        (f"{HUMAN}a{ASSISTANT} ", None),
        (f"before{HUMAN}a{ASSISTANT}b", None),
        ("", None),
    ],
)
def test_transcripts_are_read_where_speakers_take_turns(text: str, turns: list[str] | None) -> None:
    assert read_transcript(text) == turns


def test_pairs_of_unequal_prompts_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl.gz"
    rows = [
        {"chosen": f"{HUMAN}a{ASSISTANT}good", "rejected": f"{HUMAN}a{ASSISTANT}bad"},
        {"chosen": f"{HUMAN}a{ASSISTANT}good", "rejected": f"{HUMAN}z{ASSISTANT}bad"},
        {"chosen": f"{HUMAN}a{ASSISTANT}same", "rejected": f"{HUMAN}a{ASSISTANT}same"},
        {"prompt": "b", "chosen": "good", "rejected": "bad"},
    ]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    assert list(read_pairs(path)) == [Pair(["a"], "good", "bad"), Pair(["b"], "good", "bad")]


def test_texts_and_ids_of_an_example_are_the_template_s() -> None:
    tokenizer, pair = byte_level_tokenizer(), Pair(["Hi", "Hello", "What is 1 + 1?"], "2", "3")
    example = encode(pair, tokenizer, read_builtin("llama2"))
    assert example.prompt == "<s>[INST] Hi [/INST] Hello </s><s>[INST] What is 1 + 1? [/INST]"
    assert (example.chosen, example.rejected) == (" 2 ", " 3 ")
    assert tokenizer.decode(example.rejected_ids) == f"{example.prompt} 3 </s>"
    assert example.chosen_ids[: len(example.prompt_ids)] == example.prompt_ids
    record = as_sharegpt(pair)
    assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt", "human"]
    assert record["chosen"] == {"from": "gpt", "value": "2"}


def test_pairs_are_spread_over_those_that_fit(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    lengths = [1, 400, 1, 1, 400, 1, 1, 1]
    rows = [
        {"prompt": f"{i} " + "word " * length, "chosen": "good", "rejected": "bad"}
        for i, length in enumerate(lengths)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, examples = choose_pairs(path, 3, byte_level_tokenizer())
    assert [pair.turns[0][0] for pair in pairs] == ["0", "3", "6"]
    assert len(examples) == 3
    with pytest.raises(SystemExit, match="6 pairs fit, 7 are needed"):
        choose_pairs(path, 7, byte_level_tokenizer())


def test_speed_is_compared_turn_by_turn() -> None:
    own = {"turn_targets": [8, 8, 8], "turn_wall_s": [1.0, 4.0, 2.0]}
    other = {"turn_targets": [8, 8, 4], "turn_wall_s": [2.0, 8.0, 8.0]}
    assert rate_of(own, other) == 2.0


def test_what_is_neither_rollout_nor_score_is_update() -> None:
    def report(wall: float, rollout: float, score: float) -> list[dict[str, Any]]:
        return [{"wall_s": wall, "seconds": {"rollout": rollout, "score": score}}]

    reports = [report(6.0, 2.0, 1.0), report(5.0, 2.5, 0.5), report(9.0, 4.0, 1.5)]
    assert parts(reports) == {"rollout": 2.5, "score": 1.0, "update": 3.0}
