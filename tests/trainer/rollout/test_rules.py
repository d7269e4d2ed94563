"""The rules that judge an answer by its text."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from trainer.rollout.rules import contains, exact, language, length, regex, script_of

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("response", "reward"),
    [("", 0.0), ("abcde", 0.5), (" abcdefghij\n", 1.0), ("a" * 20, 1.0), ("a" * 80, 0.25)],
)
def test_length_pays_a_window_and_the_way_to_it(response: str, reward: float) -> None:
    assert length("?", response, None, low=10, high=20) == reward


def test_length_without_a_lowest() -> None:
    assert length("?", "", None, high=20) == 1.0


@pytest.mark.parametrize("options", [{"low": 5, "high": 4}, {"low": -1, "high": 4}, {"high": 0}])
def test_length_refuses_windows_that_are_none(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected 0 <= low <= high"):
        length("?", "", None, **options)


def test_regex_searches_and_its_ends_are_the_responses() -> None:
    assert regex("?", "first\nno. 7.", None, pattern=r"no\. \d") == 1.0
    assert regex("?", "first\nno. 7.", None, pattern=r"^no") == 0.0
    assert regex("?", "a\nb", None, pattern=r"^a.b$") == 1.0


def test_contains_is_the_share_that_occurs() -> None:
    assert contains("?", "茶要熱，水要滾", None, texts=["茶", "水", "酒", "熱"]) == 0.75
    with pytest.raises(ValueError, match="at least one character"):
        contains("?", "", None, texts=[""])


def test_exact_compares_with_the_datas_answer() -> None:
    assert exact("?", " Ｔaipei\n", "taipei") == 1.0
    assert exact("?", "Taipei City", "Taipei") == 0.0
    pattern = r"####\s*(\S+)"
    assert exact("?", "1 + 1 #### 3, no: #### 2", "it is #### 2", pattern=pattern) == 1.0
    assert exact("?", "#### 2", "2", pattern=pattern) == 1.0  # the answer alone has no mark
    assert exact("?", "2", "it is #### 2", pattern=pattern) == 0.0
    with pytest.raises(ValueError, match="no answer to this prompt"):
        exact("?", "2", None)


def test_language_tells_the_scripts_apart() -> None:
    assert language("?", "我們的國家，發展很快。", None) == 1.0
    assert language("?", "hello world", None) == 0.0
    assert language("?", "123 —…", None) == 0.0
    assert language("?", "國 a", None) == 0.5
    simplified = language("?", "我们的国家发展很快，这个体系与万物相关。", None)
    assert simplified < 0.2 < language("?", "我們的國家 is growing", None)
    assert language("?", "发这说时书", None) == -1.0


def test_marks_of_a_script_by_the_standards() -> None:
    assert [script_of(char) for char in "國国万后かA，ㄅ한"] == [1, -1, 0, 1, 0, 0, 0, 0, 0]


def test_our_own_traditional_texts_count_as_such() -> None:
    lines = (ROOT / "samples/zh_tw.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    han = [script_of(char) for char in "".join(texts) if "一" <= char <= "鿿"]
    assert sum(han) / len(han) > 0.995


def test_real_texts_of_both_scripts() -> None:
    folder = ROOT.parent / "shared/data/preference"
    if not folder.is_dir():
        pytest.skip("../shared/data is absent")
    texts = [
        (folder / "llama_factory/dpo_zh_demo.json").read_bytes(),
        gzip.decompress((folder / "derived_tw/dpo_zh_demo_s2twp.json.gz").read_bytes()),
    ]
    rewards = [
        [language("?", row["chosen"]["value"], None) for row in json.loads(text)] for text in texts
    ]
    means = [sum(own) / len(own) for own in rewards]
    better = sum(theirs > ours for ours, theirs in zip(*rewards, strict=True))
    assert means[0] < 0.45 and means[1] > 0.85, means
    assert better > 0.95 * len(rewards[0])
