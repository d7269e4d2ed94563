"""Tokens become whole characters, and stop texts never show."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokenizer.load import load_tokenizer
from trainer.inference.text_stream import AnswerStream, Detokenizer

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
TEXT = "春眠不覺曉，\n處處  聞啼鳥。 Rain 🌧️ and 𥳇: naïve café\n\n  indented"


@pytest.fixture(scope="module")
def byte_level() -> Any:
    """Return a byte-level BPE tokenizer, as of Llama-3 and Qwen, whose tokens split characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=262,
        initial_alphabet=alphabet,
        special_tokens=["<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


@pytest.fixture(scope="module")
def byte_fallback(english_tokenizer: Path) -> Any:
    return load_tokenizer(english_tokenizer)


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def pieces(tokenizer: Any, token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.feed(token_id) for token_id in token_ids]


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_pieces_are_the_text(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    token_ids = encode(tokenizer, TEXT)
    assert len(token_ids) > len(TEXT), "the test is about characters of several tokens"
    fed = pieces(tokenizer, token_ids)
    assert "".join(fed) == tokenizer.decode(token_ids)
    assert "" in fed and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in fed)


@pytest.mark.parametrize("name", ["llama2", "chinese-alpaca-2", "mistral/tokenizer.model.v1"])
def test_pieces_of_real_tokenizers_are_the_text(name: str) -> None:
    poems = DATA / "pretrain/tang_poems.jsonl.gz"
    if not poems.exists():
        pytest.skip(f"no real data in {DATA}")
    with gzip.open(poems, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for _, line in zip(range(40), file, strict=False)]
    tokenizer = load_tokenizer(DATA / "tokenizers" / name)
    for text in texts:
        assert "".join(pieces(tokenizer, encode(tokenizer, text))) == text


def test_bytes_that_are_no_character_have_no_text(byte_fallback: Any) -> None:
    start, end = encode(byte_fallback, "a春")[:-1], encode(byte_fallback, "b")
    fed = pieces(byte_fallback, start + end)
    assert "".join(fed).split() == ["a", "b"]


def answer(tokenizer: Any, text: str, stop: list[str], limit: int = 10**6) -> AnswerStream:
    shown: list[str] = []
    stream = AnswerStream(tokenizer, [tokenizer.eos_token_id], stop, limit, shown.append)
    for token_id in [*encode(tokenizer, text), tokenizer.eos_token_id, *encode(tokenizer, "junk")]:
        stream.feed(token_id)
    assert "".join(shown) == stream.text
    return stream


def test_end_token_ends_and_counts(byte_fallback: Any) -> None:
    stream = answer(byte_fallback, "春眠", [])
    assert (stream.text, stream.finish_reason) == ("春眠", "stop")
    assert len(stream.token_ids) == len(encode(byte_fallback, "春眠")) + 1
    cut = answer(byte_fallback, "春眠", [], limit=3)
    assert cut.finish_reason == "length" and len(cut.token_ids) == 3


@settings(max_examples=60, deadline=None)
@example(text="#aa", stops=["a", "#aa"])
@given(
    text=st.text(alphabet="ab春。#\n ", min_size=1, max_size=24),
    stops=st.lists(st.text(alphabet="ab春。#\n", min_size=1, max_size=4), max_size=3),
)
def test_stop_texts_cut_where_plain_search_would(
    english_tokenizer: Path, text: str, stops: list[str]
) -> None:
    tokenizer = _cached(english_tokenizer)
    fed = pieces(tokenizer, encode(tokenizer, text))
    expected = "".join(fed)
    for num_pieces in range(1, len(fed) + 1):  # the first stop text to be complete ends the answer
        so_far = "".join(fed[:num_pieces])
        found = [at for at in map(so_far.find, stops) if at >= 0]
        if found:
            expected = so_far[: min(found)]
            break
    assert answer(tokenizer, text, stops).text == expected.lstrip()


_LOADED: dict[Path, Any] = {}


def _cached(folder: Path) -> Any:
    if folder not in _LOADED:
        _LOADED[folder] = load_tokenizer(folder)
    return _LOADED[folder]
