"""Words that tell answers apart are found; without any, the judge guesses."""

from random import Random

from benchmarks.inputs.word_judge import count_words, judge_by_words, prefer_shorter


def test_words_and_pairs_of_words_are_counted() -> None:
    assert count_words("No, no.") == {
        "no": 2, ",": 1, ".": 1, "no ,": 1, ", no": 1, "no .": 1
    }  # fmt: skip


def test_judge_finds_the_words_that_decide() -> None:
    random = Random(0)
    words = ["wind", "north", "harbour", "boats", "cold", "over"]

    def text(*ends: str) -> str:
        return " ".join([*random.choices(words, k=6), *ends])

    pairs = [(text("sorry"), text("sure")) for _ in range(60)]
    assert judge_by_words(pairs[:40], pairs[40:]) == 20
    backwards = [(rejected, chosen) for chosen, rejected in pairs[40:]]
    assert judge_by_words(pairs[:40], backwards) == 0
    alike = [(text(), text()) for _ in range(130)]
    assert 20 < judge_by_words(alike[:30], alike[30:]) < 80


def test_shorter_answers_are_preferred() -> None:
    assert prefer_shorter([("a", "bb"), ("bb", "a"), ("a", "b")]) == 1
