"""Training pieces: the sample, the runs, and the errors."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest

from tokenizer.scripts import script_of
from tokenizer.spm import parse_model
from tokenizer.train import TextSample, cut_text, script_runs, train_pieces
from trainer.errors import DataError

TEXTS = [
    "今天天氣很好，我們去公園散步。",
    "明天 also 要去公園散步 123，今天不去" * 5,
    "no such script",
]


def sample_texts(texts: Iterable[str], max_chars: int, seed: int = 0) -> list[str]:
    sample = TextSample(max_chars, seed)
    for text in texts:
        sample.add(text)
    return sample.texts()


def test_sample_is_all_when_it_fits_and_bounded_when_not() -> None:
    texts = [f"{i:04d}" for i in range(1000)]
    assert sample_texts(texts, 4000) == texts
    sample = sample_texts(iter(texts), 400, seed=1)
    assert len(sample) == 100
    assert sample == sorted(sample)  # order of the stream
    assert sample == sample_texts(iter(texts), 400, seed=1)
    assert sample != sample_texts(iter(texts), 400, seed=2)
    assert 350 < sum(map(int, sample)) / len(sample) < 650  # from the whole stream


def test_long_documents_are_cut_and_not_lost() -> None:
    book = "".join(f"line {i}\n" for i in range(10_000))
    sample = sample_texts([book], 30_000)
    assert 10_000 < sum(map(len, sample)) <= 30_000
    assert all(text.endswith("\n") and text in book for text in sample)
    assert sample_texts([book], 10**6) == list(cut_text(book, 20_000))
    assert "".join(cut_text(book, 20_000)) == book
    assert sample_texts(["x" * 50], 10) == ["x" * 10]


def test_runs_hold_the_wanted_scripts_only() -> None:
    assert list(script_runs(["a中，文b 山\n水 12"], ["han", "cjk_punctuation"])) == [
        "中，文",
        "山",
        "水",
    ]
    assert list(script_runs(["a中b\ncd"], ["all"])) == ["a中b", "cd"]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_pieces_are_of_the_scripts_and_deterministic(model_type: str) -> None:
    first = train_pieces(TEXTS, 22, model_type)  # type: ignore[arg-type]
    assert first == train_pieces(iter(TEXTS), 22, model_type)  # type: ignore[arg-type]
    pieces = [piece.piece for piece in parse_model(first, "trained").pieces]
    assert len(pieces) == 22
    scripts = {script_of(c) for piece in pieces[3:] for c in piece}
    assert scripts == {"han", "cjk_punctuation"}
    assert "，" in pieces  # the identity normaliser keeps the full-width comma


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_too_large_a_size_names_one_that_works(model_type: str) -> None:
    with pytest.raises(DataError, match=r"vocab_size=5000: .* the largest size that works") as info:
        train_pieces(TEXTS, 5000, model_type)  # type: ignore[arg-type]
    largest = int(re.search(r"works is (\d+)", str(info.value))[1])  # type: ignore[index]
    trained = train_pieces(TEXTS, largest, model_type)  # type: ignore[arg-type]
    assert len(parse_model(trained, "trained").pieces) == largest


def test_too_small_a_size_and_no_text() -> None:
    with pytest.raises(DataError, match=r"vocab_size=5: .* smallest size that works is \d\d"):
        train_pieces(TEXTS, 5)
    with pytest.raises(DataError, match="no text in scripts hangul"):
        train_pieces(TEXTS, 24, scripts=["hangul"])
