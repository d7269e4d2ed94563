"""Ids of the encoder equal those of the fast tokenizer, whatever the text."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tokenizer.load import load_tokenizer
from trainer.data.encode import Encoder, EncoderSpec, is_cuttable, token_dtype

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"no real data at {DATA}")
TRICKY = [
    " ",
    "\n\n  \t  ",
    "a",
    "  two  spaces ",
    "▁ the mark itself ▁▁",
    "<0x0A> written out",
    "</s> and <s> written out, <unk> too",
    "中華民國 Republic of China 一百年",
    "𠮷𠮷 👩‍👩‍👧 e\u0301",
    "x" * 5000,
    "aaaa" * 300 + " " * 300 + "\n" * 300,
    "\uffff\ufffe\ue000",
]


def check_equal(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    encoder = Encoder(EncoderSpec.of(tokenizer))
    expected = [encoding.ids for encoding in plain_encodings(tokenizer, texts)]
    ends = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    for round_number in range(2):  # the second time from the pool
        for text, ids, want in zip(texts, encoder.encode(texts), expected, strict=True):
            got = np.frombuffer(ids, encoder.dtype).tolist()
            assert got == [ends[0], *want, ends[1]], (round_number, text[:50])


def plain_encodings(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list:
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True  # documents are text: nothing in them is a control token
    return backend.encode_batch(texts, add_special_tokens=False)


@pytest.fixture(scope="module", params=["trained", "llama2", "chinese-alpaca-2", "mistral"])
def tokenizer(request: pytest.FixtureRequest, english_tokenizer: Path) -> PreTrainedTokenizerFast:
    if request.param == "trained":
        return load_tokenizer(english_tokenizer)
    name = "tokenizer.model.v1" if request.param == "mistral" else "tokenizer.model"
    path = DATA / "tokenizers" / request.param / name
    if not path.exists():
        pytest.skip(f"no real data at {path}")
    return load_tokenizer(path)


def test_tricky_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    assert is_cuttable(json.loads(tokenizer.backend_tokenizer.to_str()))
    check_equal(tokenizer, TRICKY)


def test_random_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(EncoderSpec.of(tokenizer))
    words = st.sampled_from(
        ["the", "of", "中", "國", "▁", "，。", "<s>", "\n", "  ", "tion", "1999"]
    )
    anything = st.characters(exclude_categories=["Cs"])

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.lists(words | anything, min_size=1).map("".join), min_size=1, max_size=5))
    def check(texts: list[str]) -> None:
        expected = [encoding.ids for encoding in plain_encodings(tokenizer, texts)]
        got = [np.frombuffer(ids, encoder.dtype)[1:-1].tolist() for ids in encoder.encode(texts)]
        assert got == expected

    check()


@needs_data
@pytest.mark.parametrize("name", ["tang_poems.jsonl.gz", "archive_tw.jsonl.gz"])
def test_real_texts(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    with gzip.open(DATA / "pretrain" / name, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for _, line in zip(range(20), file, strict=False)]
    check_equal(tokenizer, texts)


def test_full_pool_is_emptied(english_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.encode.MAX_POOL_IDS", 10)
    check_equal(load_tokenizer(english_tokenizer), TRICKY)


def test_byte_level_tokenizer_is_asked_directly() -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<b>", "<e>"]
    )
    backend.train_from_iterator(["the cat sat on the mat"] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<b>", eos_token="<e>", model_max_length=4
    )
    assert not is_cuttable(json.loads(backend.to_str()))
    check_equal(tokenizer, TRICKY)


def test_bpe_that_fuses_unknown_characters_is_not_cut(english_tokenizer: Path) -> None:
    spec = json.loads(load_tokenizer(english_tokenizer).backend_tokenizer.to_str())
    spec["model"]["byte_fallback"] = False
    assert not is_cuttable(spec)


def test_pad_token_falls_back_to_the_end_token(english_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(english_tokenizer)
    tokenizer.pad_token = None
    assert EncoderSpec.of(tokenizer).pad_token_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert EncoderSpec.of(tokenizer).pad_token_id == 0


def test_ids_take_two_bytes_while_they_can() -> None:
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


def test_spelt_special_token_stays_text(tmp_path: Path) -> None:
    from tokenizer.load import save_tokenizer
    from tokenizer.train import train_base

    lines = [f"line {n} of a small corpus with some words" for n in range(200)]
    tokenizer = save_tokenizer(train_base(lines, vocab_size=290), tmp_path / "tokenizer")
    encoder = Encoder(EncoderSpec.of(tokenizer))
    [ids] = (np.frombuffer(data, encoder.dtype) for data in encoder.encode(["a </s> b <s>"]))
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids[1:-1].tolist())
    assert tokenizer.decode(ids[1:-1]).strip() == "a </s> b <s>"
