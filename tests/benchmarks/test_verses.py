"""Measures of verse: hand-computed values, and rhymes learnt from a few made-up poems."""

from __future__ import annotations

import pytest

from benchmarks.inputs.verses import Form, Rhymes, clauses, couplets, form, overlap, same_rhymes

COUPLET = "秦川雄帝宅，函谷壯皇居。"
TRUTH = "綺殿千尋起，離宮百雉餘。"
LONG = "連甍遙接漢，飛觀迥凌虛。雲日隱層闕，風煙出綺疎。綺殿千尋起，離宮百雉餘。"


def test_clauses_are_cut_at_any_mark_and_in_one_spelling() -> None:
    assert clauses("夫子何爲者？栖栖\t一代中。\n") == ["夫子何為者", "栖栖", "一代中"]
    assert clauses("。\n") == []


def test_couplets_are_the_pairs_of_clauses() -> None:
    assert couplets(["甲", "乙", "丙", "丁", "戊"]) == {"甲乙", "丙丁"}


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        (TRUTH, TRUTH, Form(length=True, count=True, regular=True)),
        (LONG, TRUTH, Form(length=True, count=False, regular=True)),
        (TRUTH + TRUTH, LONG, Form(length=True, count=False, regular=False)),
        ("綺殿千尋起，離宮百雉。", TRUTH, Form(length=False, count=True, regular=False)),
        ("綺殿千尋起，離宮百雉餘", TRUTH, Form(length=True, count=True, regular=True)),
        ("", TRUTH, Form(length=False, count=False, regular=False)),
    ],
)
def test_form(answer: str, truth: str, expected: Form) -> None:
    assert form(COUPLET, answer, truth) == expected
    assert expected.whole is (expected.length and expected.count)


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("明月光。", "明月光，", 1.0),
        ("明明明", "明月光", 2 * 1 / 6),  # a character counts as often as it is in both
        ("明月", "明月光寒", 2 * 2 / 6),
        ("爲", "為", 1.0),
        ("山水", "明月", 0.0),
        ("", "明月", 0.0),
    ],
)
def test_overlap(answer: str, truth: str, expected: float) -> None:
    assert overlap(answer, truth) == pytest.approx(expected)


def quatrain(*ends: str) -> list[str]:
    """Return four clauses, the even ones with these last characters."""
    return [f"一二三四{end}" for end in ("起", ends[0], "落", ends[1])]


@pytest.fixture(scope="module")
def rhymes() -> Rhymes:
    # 居 餘 虛 rhyme by poems that pair them in a chain, 中 風 with each other.
    pairs = [("居", "餘"), ("餘", "虛"), ("中", "風")] * 3
    irregular = [["一二三四五", "一二中", "一二三四五", "一二居"]]  # uneven clauses teach nothing
    return Rhymes([*(quatrain(*pair) for pair in pairs), *irregular])


def test_rhymes_join_what_rhymes_with_the_same_others(rhymes: Rhymes) -> None:
    assert len(rhymes) == 5
    assert rhymes.rhyme("居", "餘") and rhymes.rhyme("餘", "居")
    assert rhymes.rhyme("居", "虛")  # never in one poem
    assert not rhymes.rhyme("居", "中") and not rhymes.rhyme("居", "風")
    assert rhymes.rhyme("怪", "怪") and not rhymes.rhyme("怪", "居")


def test_agreement_counts_even_clauses_that_rhyme_with_the_couplet(rhymes: Rhymes) -> None:
    assert rhymes.agreement(COUPLET, "連甍遙接漢，離宮百雉餘。") == 1.0
    assert rhymes.agreement(COUPLET, "連甍遙接漢，離宮百雉餘。一二三四五，一二三四中。") == 0.5
    assert rhymes.agreement(COUPLET, "連甍遙接漢，離宮百雉居。") == 0.0  # the same character
    assert rhymes.agreement(COUPLET, "連甍遙接漢") is None
    assert rhymes.agreement(COUPLET, "") is None


def test_same_rhymes_is_the_share_of_pairs(rhymes: Rhymes) -> None:
    assert same_rhymes(rhymes, ["居", "餘", "中"]) == pytest.approx(1 / 3)
