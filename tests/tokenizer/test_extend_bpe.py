"""Extending byte-level BPE: reachability, unchanged old text, stable ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tokenizer.extend_bpe import (
    byte_alphabet,
    extend_byte_level,
    is_byte_level,
    read_spelling,
    spell_bytes,
)
from tokenizer.load import load_tokenizer, num_ids
from tokenizer.scripts import run_pattern
from tokenizer.spm import parse_model
from trainer.errors import DataError

# The split of the Llama-3 family: letters with one leading sign, numbers, signs, spaces.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
CORPUS = [
    "The wolf went away. Café naïve — “quoted” … ¿dónde?",
    "мир и война 123 456",
    "ひらがな カタカナ ＡＢＣ",
    "中 文",
] * 30


@pytest.fixture(scope="module", params=[False, True], ids=["merges", "ignore_merges"])
def base(request: pytest.FixtureRequest) -> Tokenizer:
    """Return a byte-level BPE with special tokens after its vocabulary, as Llama-3 has them."""
    backend = Tokenizer(models.BPE(ignore_merges=request.param))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken("<|begin|>", special=True), AddedToken("<|end|>")])
    return backend


PIECES = [
    "臺灣大學",
    "山水",
    "臺灣",
    "大學",
    "山",
    "水",
    "臺",
    "灣",
    "大",
    "學",
    "。」",
    "ab",
    "山。",
]


def test_alphabet_is_that_of_tokenizers() -> None:
    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert read_spelling(spell_bytes("臺 ab\n")) == "臺 ab\n".encode()


@pytest.mark.parametrize("dead_pieces", ["drop", "revive"])
def test_every_piece_is_reached_in_one_token(base: Tokenizer, dead_pieces: str) -> None:
    extension = extend_byte_level(base.to_str(), PIECES, dead_pieces=dead_pieces)  # type: ignore[arg-type]
    extended = Tokenizer.from_str(extension.tokenizer_json)
    for text in extension.added:
        ids = extended.encode(text).ids
        assert len(ids) == 1
        assert extended.decode(ids) == text
        assert ids[0] in extended.encode(f"x \n{text}\n").ids or text.endswith("」")
    assert {"臺灣大學", "山水"} <= set(extension.added)
    assert extension.dropped["other scripts"] == ["ab"]
    assert extension.dropped["cut by the pre-tokenizer"] == ["山。"]


def test_word_without_its_parts_is_dropped_or_revived(base: Tokenizer) -> None:
    pieces = ["臺", "灣", "大", "臺灣大"]
    assert extend_byte_level(base.to_str(), pieces).dropped["dead"] == ["臺灣大"]
    revived = extend_byte_level(base.to_str(), pieces, dead_pieces="revive")
    assert "臺灣大" in revived.added
    assert spell_bytes("臺灣") in revived.intermediates


def test_old_text_and_old_ids_are_unchanged(base: Tokenizer) -> None:
    extended = Tokenizer.from_str(extend_byte_level(base.to_str(), PIECES).tokenizer_json)
    old = base.get_vocab(with_added_tokens=True)
    new = extended.get_vocab(with_added_tokens=True)
    assert old.items() <= new.items()
    assert sorted(new.values()) == list(range(len(new)))
    assert min(set(new.values()) - set(old.values())) == max(old.values()) + 1
    wide = "".join(map(chr, [*range(0x20, 0x3000), *range(0x3040, 0x3400), *range(0xA000, 0xD7FF)]))
    texts = [*CORPUS, wide, " a\u3042\u30a2 \uff21 \uac00\U0001f600 <|begin|>x<|end|>"]
    cjk = run_pattern(("han", "cjk_punctuation"))
    for text in (cjk.sub("", text) for text in texts):
        assert extended.encode(text).ids == base.encode(text).ids


def test_bytes_of_other_scripts_are_left_alone(base: Tokenizer) -> None:
    # ｛ (EF BD 9B) shares EF BD with full-width letters and kana, which are not asked for.
    extension = extend_byte_level(base.to_str(), ["｛", "山"])
    assert extension.dropped["bytes shared with other scripts"] == ["｛"]
    all_of_them = ("han", "cjk_punctuation", "fullwidth", "kana")
    assert "｛" in extend_byte_level(base.to_str(), ["｛", "山"], scripts=all_of_them).added


def test_saved_folder_loads_in_plain_transformers(base: Tokenizer, tmp_path: Path) -> None:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<|end|>")
    wrapped.save_pretrained(tmp_path)
    extension = extend_byte_level((tmp_path / "tokenizer.json").read_text(), PIECES)
    (tmp_path / "tokenizer.json").write_text(extension.tokenizer_json)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert num_ids(plain) == num_ids(wrapped) + len(extension.added) + len(extension.intermediates)
    assert plain.eos_token_id == wrapped.eos_token_id
    text = "臺灣大學在山水之間 with 12 wolves<|end|>"
    assert plain.decode(plain.encode(text)) == text
    assert plain.encode(text) == load_tokenizer(tmp_path).encode(text)
    assert len(plain.encode(text)) < len(wrapped.encode(text))


def test_real_pieces_on_real_text(
    base: Tokenizer, chinese_sp: bytes, sampled_texts: dict[str, list[str]]
) -> None:
    pieces = [p.piece for p in parse_model(chinese_sp, "chinese_sp").pieces[3:6000]]
    extension = extend_byte_level(base.to_str(), pieces)
    extended = Tokenizer.from_str(extension.tokenizer_json)
    assert all(len(extended.encode(text).ids) == 1 for text in extension.added)
    assert len(extension.added) > 3000
    text = "\n".join(sampled_texts["archive_tw"])[:100_000]
    assert len(extended.encode(text).ids) < 0.5 * len(base.encode(text).ids)
    assert extended.decode(extended.encode(text).ids) == text
    for english in (*sampled_texts["en_c4"], *sampled_texts["en_wiki"]):
        plain = run_pattern(("han", "cjk_punctuation")).sub("", english[:3000])
        assert extended.encode(plain).ids == base.encode(plain).ids


def test_other_kinds_are_refused(base: Tokenizer) -> None:
    other = json.loads(base.to_str())
    other["pre_tokenizer"] = other["decoder"] = None
    assert not is_byte_level(other)
    with pytest.raises(DataError, match=r"not byte-level BPE.*tokenizer\.model"):
        extend_byte_level(json.dumps(other), PIECES)
    with pytest.raises(DataError, match="nothing to add"):
        extend_byte_level(base.to_str(), ["ab"])
