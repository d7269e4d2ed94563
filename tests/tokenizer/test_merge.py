"""The compatible merge against published hashes; the clean merge against its promises."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2 as proto

from tokenizer.merge import merge_clean, merge_compatible, segment
from tokenizer.scripts import run_pattern, scripts_of
from tokenizer.spm import build_fast_tokenizer, parse_model, processor_from
from tokenizer.train import train_pieces
from trainer.errors import ConfigError, DataError

REPO = Path(__file__).resolve().parents[2]
CHINESE_LLAMA = "e2676d4ca29ca1750f6ff203328d73b189321dc5776ceede037cbd36541d70c0"
CHINESE_ALPACA = "2d967e855b1213a439df6c8ce2791f869c84b4f3b6cfacf22b86440b8192a2f8"


def donor_of(*pieces: str) -> bytes:
    """Return a unigram model with these pieces, best first."""
    model = proto.ModelProto()
    model.trainer_spec.model_type = 1
    for name, kind in (("<unk>", 2), ("<s>", 3), ("</s>", 3)):
        model.pieces.add(piece=name, score=0.0, type=kind)
    for rank, piece in enumerate(pieces):
        model.pieces.add(piece=piece, score=-float(rank) - 1.0)
    return bytes(model.SerializeToString())


def dead(model_bytes: bytes, pieces: list[str]) -> list[str]:
    """Return the pieces that SentencePiece itself never produces; after a line end, no prefix."""
    processor = processor_from(model_bytes)
    return [p for p in pieces if processor.encode("\n" + p, out_type=str)[2:] != [p]]


def test_compatible_merge_gives_the_published_bytes(llama2: bytes, chinese_sp: bytes) -> None:
    merged = merge_compatible(llama2, chinese_sp)
    assert len(merged.model_bytes) == 757_958
    assert hashlib.sha256(merged.model_bytes).hexdigest() == CHINESE_LLAMA
    with_pad = merge_compatible(llama2, chinese_sp, ["[PAD]"])
    assert len(parse_model(with_pad.model_bytes, "merged").pieces) == 49_954
    assert hashlib.sha256(with_pad.model_bytes).hexdigest() == CHINESE_ALPACA


def test_compatible_merge_has_the_known_dead_pieces(llama2: bytes, chinese_sp: bytes) -> None:
    merged = merge_compatible(llama2, chinese_sp)
    found = dead(merged.model_bytes, merged.added)
    assert len(found) == 345
    assert "中華民國" in found


@pytest.mark.parametrize("dead_pieces", ["drop", "revive"])
def test_clean_merge_has_no_dead_piece(llama2: bytes, chinese_sp: bytes, dead_pieces: str) -> None:
    merged = merge_clean(llama2, chinese_sp, dead_pieces=dead_pieces)  # type: ignore[arg-type]
    assert dead(merged.model_bytes, merged.added) == []
    assert ("中華民國" in merged.added) == (dead_pieces == "revive")
    assert all(scripts_of(piece) <= {"han", "cjk_punctuation"} for piece in merged.added)


@pytest.mark.parametrize("dead_pieces", ["drop", "revive"])
def test_clean_merge_on_real_text(
    sampled_texts: dict[str, list[str]], llama2: bytes, chinese_sp: bytes, dead_pieces: str
) -> None:
    merged = merge_clean(llama2, chinese_sp, dead_pieces=dead_pieces)  # type: ignore[arg-type]
    check_parity_and_drift(llama2, merged.model_bytes, sampled_texts)


@pytest.mark.slow
def test_clean_merge_on_all_real_text(
    whole_texts: dict[str, list[str]], llama2: bytes, chinese_sp: bytes
) -> None:
    merged = merge_clean(llama2, chinese_sp)
    check_parity_and_drift(llama2, merged.model_bytes, whole_texts)


def check_parity_and_drift(base: bytes, merged: bytes, sources: dict[str, list[str]]) -> None:
    old, new = processor_from(base), processor_from(merged)
    fast = build_fast_tokenizer(merged, "merged").backend_tokenizer
    cjk, num_without_cjk = run_pattern(("han", "cjk_punctuation")), 0
    for texts in sources.values():
        ids = new.encode(texts)
        fast_ids = [e.ids for e in fast.encode_batch(texts, add_special_tokens=False)]
        assert ids == fast_ids
        assert [new.decode(row) for row in ids] == texts
        lines = [line for text in texts for line in text.split("\n") if line]
        plain = [x for x in lines if not cjk.search(x)]
        num_without_cjk += len(plain)
        assert new.encode(plain) == old.encode(plain)
    assert num_without_cjk > 1000


def test_clean_merge_reaches_the_published_compression(
    sampled_texts: dict[str, list[str]], llama2: bytes, chinese_sp: bytes
) -> None:
    processor = processor_from(merge_clean(llama2, chinese_sp).model_bytes)
    base = processor_from(llama2)
    for name in ("archive_tw", "react_zh_hant", "rust_book_tw"):
        runs = [
            "\n" + "".join(c for c in text if scripts_of(c) == {"han"})
            for text in sampled_texts[name]
        ]
        characters = sum(len(run) - 1 for run in runs)
        before, after = (
            (sum(map(len, p.encode(runs))) - 2 * len(runs)) / characters for p in (base, processor)
        )
        assert before > 1.65
        assert after < 0.80


def test_pieces_of_other_scripts_stay_out_unless_asked_for(small_base: bytes) -> None:
    donor = donor_of("山水", "12", "ab山", "▁河", "ㄅ", "山", "水", "河", "——")
    merged = merge_clean(small_base, donor)
    assert "山水" in merged.added
    assert set(merged.dropped["other scripts"]) == {"12", "ab山", "▁河", "ㄅ", "——"}
    with_bopomofo = merge_clean(small_base, donor, scripts=["han", "bopomofo"])
    assert "ㄅ" in with_bopomofo.added
    everything = merge_clean(small_base, donor, scripts=["all"])
    assert {"▁河", "ㄅ", "山水"} <= set(everything.added)
    assert dead(everything.model_bytes, everything.added) == []


def test_dead_piece_is_dropped_or_revived_through_an_intermediate(small_base: bytes) -> None:
    donor = donor_of("甲", "乙", "丙", "甲乙丙")  # no 甲乙, no 乙丙: the whole cannot form
    dropped = merge_clean(small_base, donor)
    assert dropped.dropped["dead"] == ["甲乙丙"]
    assert dropped.added == ["甲", "乙", "丙"]
    revived = merge_clean(small_base, donor, dead_pieces="revive")
    assert revived.intermediates == ["甲乙"]
    assert dead(revived.model_bytes, revived.added) == []


def test_intermediate_that_occurs_twice_still_reaches_the_whole(small_base: bytes) -> None:
    donor = donor_of("甲", "乙", "丙", "甲乙甲乙丙")
    revived = merge_clean(small_base, donor, dead_pieces="revive")
    assert dead(revived.model_bytes, revived.added) == []
    assert revived.intermediates == ["甲乙", "甲乙甲乙"]


def test_piece_with_an_unknown_character_is_dead_for_the_fast_encoder(small_base: bytes) -> None:
    donor = donor_of("甲", "甲辰")  # 辰 is no piece: SentencePiece would merge it, tokenizers not
    assert merge_clean(small_base, donor).dropped["dead"] == ["甲辰"]
    revived = merge_clean(small_base, donor, dead_pieces="revive")
    assert set(revived.added) == {"甲", "甲辰", "辰"}
    fast = build_fast_tokenizer(revived.model_bytes, "merged")
    assert fast.encode("\n甲辰", add_special_tokens=False)[2:] == [fast.get_vocab()["甲辰"]]


def test_new_scores_are_distinct_and_below_the_base(llama2: bytes, chinese_sp: bytes) -> None:
    base = parse_model(llama2, "base")
    merged = parse_model(merge_clean(llama2, chinese_sp).model_bytes, "merged")
    new = [piece.score for piece in merged.pieces[len(base.pieces) :]]
    assert new == sorted(set(new), reverse=True)
    assert new[0] < min(piece.score for piece in base.pieces if piece.score > -1e6)
    assert [p.piece for p in merged.pieces[: len(base.pieces)]] == [p.piece for p in base.pieces]


def test_extra_pieces_are_control_and_pad_is_named(small_base: bytes) -> None:
    merged = merge_clean(small_base, donor_of("甲"), extra_pieces=["[PAD]", "<tool>"])
    tokenizer = build_fast_tokenizer(merged.model_bytes, "merged")
    assert merged.added[-2:] == ["[PAD]", "<tool>"]
    assert tokenizer.pad_token == "[PAD]"
    assert processor_from(merged.model_bytes).is_control(tokenizer.get_vocab()["<tool>"])


def test_duplicates_in_the_donor_are_added_once(small_base: bytes) -> None:
    for merge in (merge_clean, merge_compatible):
        merged = merge(small_base, donor_of("甲", "乙", "甲"))
        pieces = [p.piece for p in parse_model(merged.model_bytes, "merged").pieces]
        assert len(pieces) == len(set(pieces))


def test_bpe_donor_loses_nothing(small_base: bytes) -> None:
    texts = ["山水之間有人家，人家之間有山水。今天天氣好，明天天氣也好。"] * 3
    merged = merge_clean(small_base, train_pieces(texts, 40, "bpe"))
    assert merged.dropped["dead"] == []
    assert merged.dropped["other scripts"] == []


def test_merges_do_not_depend_on_the_hash_seed(
    data_dir: Path, llama2: bytes, chinese_sp: bytes
) -> None:
    program = (
        "import sys, hashlib; from pathlib import Path\n"
        "from tokenizer.merge import merge_clean, merge_compatible\n"
        "a, b = (Path(p).read_bytes() for p in sys.argv[1:3])\n"
        "for m in (merge_clean(a, b), merge_clean(a, b, dead_pieces='revive'),\n"
        "          merge_compatible(a, b)): print(hashlib.sha256(m.model_bytes).hexdigest())\n"
    )
    folder = data_dir / "tokenizers"
    files = [str(folder / "llama2/tokenizer.model"), str(folder / "chinese_sp/chinese_sp.model")]
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program, *files],
            cwd=REPO,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        for seed in ("1", "4242")
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0][2] == CHINESE_LLAMA
    assert outputs[0][0] == hashlib.sha256(merge_clean(llama2, chinese_sp).model_bytes).hexdigest()


def test_segment_by_hand() -> None:
    scores = {"a": 0.0, "b": 0.0, "c": 0.0, "ab": -2.0, "bc": -1.0, "abc": -3.0}
    assert segment("abc", scores) == ["abc"]  # bc first, then a + bc
    assert segment("abab", scores) == ["ab", "ab"]
    del scores["abc"]
    assert segment("abc", scores) == ["a", "bc"]
    assert segment("axb", scores) == ["a", "x", "b"]


def test_bad_input_is_named(small_base: bytes, chinese_sp: bytes) -> None:
    with pytest.raises(DataError, match=r"base_tokenizer is a SentencePiece unigram model"):
        merge_clean(chinese_sp, small_base)
    no_bytes = parse_model(small_base, "base")
    for piece in no_bytes.pieces:
        if piece.type == 6:
            piece.type = 1
    with pytest.raises(DataError, match="no byte fallback"):
        merge_compatible(no_bytes.SerializeToString(), chinese_sp)
    with pytest.raises(DataError, match=r"stage\.pieces is empty"):
        merge_clean(small_base, b"")
    with pytest.raises(DataError, match=r"stage\.pieces is not a SentencePiece model"):
        merge_clean(small_base, b"\x00\x01 not a model")
    with pytest.raises(DataError, match="nothing to add in scripts hangul"):
        merge_clean(small_base, donor_of("甲"), scripts=["hangul"])
    with pytest.raises(ConfigError, match="'hann', which is no script"):
        merge_clean(small_base, donor_of("甲"), scripts=["hann"])
