"""Means of the verse measures by hand, and the plot's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.inputs.poem_scores import NAMES, bounds, plot, score, table
from benchmarks.inputs.verses import Rhymes

ROWS = [
    {"instruction": "", "input": "甲乙丙丁天，甲乙丙丁居。", "output": "春夏秋冬日，東西南北餘。"},
    {"instruction": "", "input": "甲乙丙丁天，甲乙丙丁中。", "output": "春夏秋冬日，東西南北風。"},
]


@pytest.fixture(scope="module")
def rhymes() -> Rhymes:
    def poem(a: str, b: str) -> list[str]:
        return ["一二三四五", f"一二三四{a}", "一二三四五", f"一二三四{b}"]

    return Rhymes([poem("居", "餘"), poem("中", "風")])


def test_scores_are_means_over_rows(rhymes: Rhymes) -> None:
    answers = ["春夏秋冬日，東西南北餘。", "春夏秋冬。"]
    own = score(ROWS, answers, rhymes)
    assert own["length"] == own["count"] == own["form"] == own["regular"] == 0.5
    # 10 of 10 characters, then 4 shared of 4 + 10.
    assert own["overlap"] == pytest.approx((1 + 2 * 4 / 14) / 2)
    assert own["rhyme"] == 0.5  # the second has no even clause
    assert own["distinct"] == 1.0
    assert score(ROWS, ["山。", "山。"], rhymes)["distinct"] == 0.5


def test_bounds_are_perfect_form_and_the_rhyme_of_the_truth(rhymes: Rhymes) -> None:
    own = bounds(ROWS, rhymes)
    true, other = own["the true poems"], own["true poems of other couplets"]
    assert true["form"] == true["overlap"] == true["rhyme"] == 1.0
    assert other["form"] == 1.0


def test_table_and_plot_hold_every_way(rhymes: Rhymes, tmp_path: Path) -> None:
    own = score(ROWS, [row["output"] for row in ROWS], rhymes)
    scores = dict.fromkeys(("temperature=0", "temperature=1", "top_p=0.5", "top_p=1"), own)
    lines = table(scores).splitlines()
    assert len(lines) == 2 + len(scores)
    assert lines[2].startswith("| temperature=0 | 100.0 |") and lines[2].count("|") == 2 + len(
        NAMES
    )
    plot(scores, tmp_path / "a.svg")
    plot(scores, tmp_path / "b.svg")
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert text.startswith("<?xml") and len(text) > 5000
    assert text == (tmp_path / "b.svg").read_text(encoding="utf-8")
