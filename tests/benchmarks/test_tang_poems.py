"""The examined poems are in neither the pretraining text nor the tuning rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.inputs import tang_poems
from benchmarks.inputs.verses import clauses, couplets

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def row(first: str, rest: str) -> dict[str, Any]:
    return {"instruction": "續寫", "input": first, "output": rest}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Six homework poems, one examined poem, and pretraining texts that hold most of them."""
    rows = [row(f"甲{i}，乙{i}。", f"丙{i}，丁{i}。") for i in "春夏秋冬東西"]
    rows.append(row("甲春，乙春。", "戊春，己春。"))  # begins like another
    rows.append(row("庚，", "辛，壬。"))  # one clause given: never held out
    homework = tmp_path / "sft" / "tang_hw5"
    homework.mkdir(parents=True)
    (homework / "Tang_training_data.json").write_text(json.dumps(rows), "utf-8")
    test = [{"instruction": "續寫", "input": "甲南爲，乙南。"}]
    (homework / "Tang_testing_data.json").write_text(json.dumps(test), "utf-8")
    (homework / "Tang_testing_gt.txt").write_text("丙南\t丁南", "utf-8")
    poems = [f"題\n作者\n甲{i}，乙{i}。\n丙{i}，丁{i}。" for i in "春夏秋冬東西"]
    poems.append("題\n作者\n甲南為，乙南。\n丙南，丁異。")  # another reading of the test poem
    poems.append("題\n作者\n子，丑。")
    (tmp_path / "pretrain").mkdir()
    with gzip.open(tmp_path / "pretrain" / "tang_poems.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in poems)
    return tmp_path


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_examined_poems_leave_both_texts(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tang_poems, "NUM_HELD_OUT", 2)
    out = tmp_path / "out"
    counts = tang_poems.write_tang_files(small, out)
    test, held_out, train = (read(out / f"{n}.json") for n in ("test", "held_out", "train"))
    assert test == [row("甲南爲，乙南。", "丙南，丁南。")]
    assert len(held_out) == 2 and all(len(clauses(r["input"])) == 2 for r in held_out)
    examined = set().union(*(couplets(tang_poems.body(r)) for r in test + held_out))
    assert not any(couplets(tang_poems.body(r)) & examined for r in train)
    kept = [json.loads(line)["text"] for line in (out / "poems.jsonl").open(encoding="utf-8")]
    assert not any(couplets(tang_poems.verses(text)) & examined for text in kept)
    assert "題\n作者\n子，丑。" in kept
    assert counts["train"] + counts["train_removed"] == counts["homework_rows"] == 8
    assert len(kept) + counts["poems_removed"] == counts["poems"] == 8
    assert counts["poems_removed"] == 3 and counts["poems_removed_with_equal_body"] == 2


def test_too_few_rows_to_hold_out_are_an_error(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of 500 rows can be held out"):
        tang_poems.write_tang_files(small, tmp_path / "out")


@pytest.mark.skipif(not (SHARED / "sft").is_dir(), reason=f"no real data in {SHARED}")
def test_nearly_all_examined_poems_were_in_the_pretraining_text(tmp_path: Path) -> None:
    counts = tang_poems.write_tang_files(SHARED, tmp_path)
    assert (counts["homework_rows"], counts["test"], counts["held_out"]) == (5001, 15, 500)
    assert counts["poems"] == 50021
    # 14 of the 15 test poems and 4,977 of the 5,001 others are known to be there.
    assert counts["poems_removed_with_equal_body"] >= 490
    assert counts["poems_removed"] >= counts["poems_removed_with_equal_body"]
