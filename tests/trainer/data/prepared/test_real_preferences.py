"""Real preference files: all load, counts add up, transcripts come back, defects are named."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenizer.load import load_tokenizer
from trainer.config import SourceConfig
from trainer.data.chats.chat import resolve_template
from trainer.data.chats.conversations import walk_conversations
from trainer.data.chats.layout_search import find_layout
from trainer.data.chats.layouts import Layout
from trainer.data.chats.pair_encoder import PairSpec
from trainer.data.chats.preferences import Preference, read_preferences
from trainer.data.chats.prompts import read_prompt
from trainer.data.chats.transcripts import TURN
from trainer.data.reading.raw import RowError
from trainer.data.reading.records import parse_record
from trainer.data.reading.remarks import Remarks

SHARED = Path(__file__).resolve().parents[4].parent / "shared" / "data"
FOLDER = SHARED / "preference"
HH = "hh_rlhf/harmless-base_test_rows0000-1799.jsonl.gz"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="no real data at ../shared/data")

# File -> layout, rows, rejected rows, pairs, good and bad lone answers, pairs left out, remarks.
REAL: dict[str, tuple[str, tuple[int, ...], dict[str, int]]] = {
    HH: ("pairs (transcripts)", (1800, 9, 1791, 0, 0, 0), {}),
    "llama_factory/dpo_en_demo.json": ("pairs (messages)", (300, 0, 300, 0, 0, 0), {}),
    "llama_factory/dpo_zh_demo.json": (
        "pairs (messages)",
        (300, 0, 300, 0, 0, 0),
        {"replacement_characters": 6},
    ),
    "derived_tw/dpo_zh_demo_s2twp.json.gz": (
        "pairs (messages)",
        (300, 0, 300, 0, 0, 0),
        {"replacement_characters": 6},
    ),
    "llama_factory/v1_dpo_demo.jsonl": (
        "pairs (messages)",
        (10, 0, 10, 0, 0, 0),
        {"outer_space": 10},
    ),
    "llama_factory/kto_en_demo.json": ("labels", (300, 0, 0, 150, 150, 0), {"placeholders": 2}),
    "llama_factory/oaast_rm_zh.json": ("ranked", (775, 3, 1803, 0, 0, 3), {}),
}


def read(
    name: str, remarks: Remarks | None = None, **options: Any
) -> tuple[Layout, list[tuple[int, list[Preference], list[str]]]]:
    """Return a file's layout, and of each row the preferences and why others are none."""
    source = SourceConfig([str(FOLDER / name)], **options)
    layout = find_layout(FOLDER / name, source, "preferences")
    rows = []
    for row in walk_conversations(FOLDER / name, source, layout):
        try:
            found, reasons = read_preferences(parse_record(row.value), layout, remarks)
        except RowError as error:
            found, reasons = [], [error]
        rows.append((row.number, found, [str(reason) for reason in reasons]))
    return layout, rows


@pytest.mark.parametrize("name", REAL)
def test_real_file(name: str) -> None:
    form, counts, expected = REAL[name]
    remarks = Remarks()
    layout, rows = read(name, remarks)
    assert layout.describe().startswith(f"{form}; ")
    pairs = [preference for _, found, _ in rows for preference in found]
    lone = [preference for preference in pairs if not (preference.chosen and preference.rejected)]
    assert (
        len(rows),
        sum(not found for _, found, _ in rows),
        len(pairs) - len(lone),
        sum(preference.chosen is not None for preference in lone),
        sum(preference.rejected is not None for preference in lone),
        sum(len(reasons) for _, found, reasons in rows if found),
    ) == counts
    assert remarks.counts == expected
    assert all(pair.prompt.messages[-1].role == "user" for pair in pairs)
    assert all(pair.margin == 0 for pair in pairs)


def test_every_real_file_is_known() -> None:
    names = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file()}
    assert names == set(REAL)


def test_defects_are_named_with_their_rows() -> None:
    _, rows = read(HH)
    defects = {number: reasons for number, found, reasons in rows if not found}
    in_a_row, is_empty = "two assistant turns in a row", "the answer in message"
    told = {number: re.sub(r" [\d(].*", "", reasons[0]) for number, reasons in defects.items()}
    assert told == {
        **dict.fromkeys((87, 517, 926, 1104), f"chosen: {is_empty}"),
        668: f"chosen: {in_a_row}",
        764: f"chosen: {in_a_row}",
        1255: f"chosen: {in_a_row}",
        1320: f"chosen: {in_a_row}",
        1689: f"chosen: {in_a_row}",
    }
    _, rows = read("llama_factory/oaast_rm_zh.json")
    equal = [number for number, _, reasons in rows for reason in reasons if "are equal" in reason]
    records = json.loads((FOLDER / "llama_factory/oaast_rm_zh.json").read_bytes())
    answers = [record["output"] for record in records]
    repeated = [n for n, texts in enumerate(answers, 1) if len(set(texts)) < len(texts)]
    assert equal == repeated


def test_transcripts_are_split_exactly() -> None:
    _, rows = read(HH)
    names = {"user": "Human", "assistant": "Assistant"}
    with gzip.open(FOLDER / HH) as file:
        records = [json.loads(line) for line in file]
    num_checked = 0
    for (_, found, _), record in zip(rows, records, strict=True):
        for pair in found:
            for side, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
                assert answer is not None
                turns = [(m.role, m.content) for m in pair.whole(answer).messages]
                text = "".join(f"\n\n{names[role]}: {said}" for role, said in turns)
                assert text == record[side]
                assert len(TURN.findall(text)) == len(turns)
                num_checked += 1
    assert num_checked == 2 * 1791


def test_rows_made_as_dahoas_makes_them_say_the_same(tmp_path: Path) -> None:
    """Dahoas/full-hh-rlhf cuts each transcript after its last "Assistant:"; response = chosen."""
    with gzip.open(FOLDER / HH) as file:
        records = [json.loads(line) for line in file][:200]
    cut = []
    for record in records:
        prompt, mark, chosen = record["chosen"].rpartition("\n\nAssistant:")
        rejected = record["rejected"].rpartition("\n\nAssistant:")[2]
        rows = {"prompt": prompt + mark, "response": chosen, "chosen": chosen, "rejected": rejected}
        cut.append(rows)
    path = tmp_path / "dahoas.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in cut))
    layout = find_layout(path, SourceConfig([str(path)]), "preferences")
    remarks = Remarks()
    for (number, found, _), row in zip(read(HH)[1], cut, strict=False):
        if found:
            assert read_preferences(row, layout, remarks) == (found, [])
        else:
            with pytest.raises(RowError, match="chosen: the answer in message 4 is empty"):
                read_preferences(row, layout)
            assert number == 87
    assert "other_responses" not in remarks.counts


def test_prompts_of_every_file() -> None:
    """A prompt does not ask for a pair: empty and equal answers spoil none."""
    counts = {}
    for name in REAL:
        source = SourceConfig([str(FOLDER / name)])
        layout = find_layout(FOLDER / name, source, "prompts")
        answers: list[str | None] = []
        for row in walk_conversations(FOLDER / name, source, layout):
            try:
                answers.append(read_prompt(parse_record(row.value), layout)[1])
            except RowError:
                continue
        counts[name] = (len(answers), len([a for a in answers if a is not None]))
    assert counts == {
        HH: (1795, 1791),
        "llama_factory/dpo_en_demo.json": (300, 300),
        "llama_factory/dpo_zh_demo.json": (300, 300),
        "derived_tw/dpo_zh_demo_s2twp.json.gz": (300, 300),
        "llama_factory/v1_dpo_demo.jsonl": (10, 10),
        "llama_factory/kto_en_demo.json": (300, 150),
        "llama_factory/oaast_rm_zh.json": (775, 775),
    }


@pytest.mark.parametrize("name", [HH, "derived_tw/dpo_zh_demo_s2twp.json.gz"])
def test_real_pairs_share_their_beginning_and_differ_after_it(name: str) -> None:
    tokenizer = load_tokenizer(SHARED / "tokenizers" / "llama2")
    for template in ("llama2", "vicuna", "plain"):
        text = resolve_template(tokenizer, template)
        encoder = PairSpec.of(tokenizer, text, train_on="last").build()
        for _, found, _ in read(name)[1][:: 24 if name == HH else 6]:
            for preference in found:
                pair = encoder.encode_pair(preference)
                assert pair.chosen is not None and pair.rejected is not None
                one, other = pair.chosen, pair.rejected
                starts = [int(np.flatnonzero(side.weights)[0]) for side in pair.sides]
                assert starts[0] == starts[1] > 1
                assert np.array_equal(one.input_ids[: starts[0]], other.input_ids[: starts[0]])
                for side, answer in ((one, preference.chosen), (other, preference.rejected)):
                    assert answer is not None
                    ids = tokenizer.apply_chat_template(
                        preference.whole(answer).as_chat(),
                        chat_template=text,
                        tokenize=True,
                        return_dict=False,
                    )
                    assert side.input_ids.tolist()[: len(ids)] == list(ids)
                    learnt = tokenizer.decode(side.input_ids[starts[0] :])
                    assert answer.content.strip()[-40:] in learnt
