"""The audit finds what it is there to find, and counts by hand-checked figures."""

from __future__ import annotations

import json

import pytest
from sentencepiece import sentencepiece_model_pb2 as proto

from tokenizer.audit import Candidate, Subject, audit
from tokenizer.audit_page import judge, render_page, show_number, summarise
from tokenizer.measure import (
    Encoder,
    count_spelt_in_bytes,
    find_dead,
    find_disparity,
    find_drift,
    measure_density,
)
from tokenizer.merge import merge_clean, merge_compatible
from tokenizer.spm import truncate_model
from tokenizer.train import train_pieces

TEXTS = ["山水之間有人家，人家之間有山水。", "the wolf went away\n今天天氣好"]


def donor_of(*pieces: str) -> bytes:
    model = proto.ModelProto()
    model.trainer_spec.model_type = 1
    model.pieces.add(piece="<unk>", score=0.0, type=2)
    for rank, piece in enumerate(pieces):
        model.pieces.add(piece=piece, score=-float(rank) - 1.0)
    return bytes(model.SerializeToString())


@pytest.fixture(scope="module")
def base(small_base: bytes) -> Encoder:
    return Encoder.of_model(small_base)


@pytest.fixture(scope="module")
def clean(small_base: bytes) -> Encoder:
    donor = donor_of("今", "天", "山水", "今天", "氣", "好", "家")
    return Encoder.of_model(merge_clean(small_base, donor).model_bytes)


@pytest.fixture(scope="module")
def flawed(small_base: bytes) -> Encoder:
    # Score 0 beats the base's merges ("wo", "aw"), 國家大事 has no way to form, 天地/地人 tie.
    donor = donor_of("wo", "lf", "aw", "國家大事", "地人", "天地", "天", "地")
    return Encoder.of_model(merge_compatible(small_base, donor).model_bytes)


def test_density_by_hand(base: Encoder, clean: Encoder) -> None:
    # 今, 天, 氣, 好 take three bytes each in the base; 今天 is one piece, 氣 and 好 one each.
    before, after = (measure_density(encoder, ["今天氣好"]) for encoder in (base, clean))
    assert (before.tokens, before.han_tokens, before.byte_tokens) == (13, 12, 12)  # and the ▁
    assert (after.tokens, after.byte_tokens) == (4, 0)
    assert after.figures()["characters_per_token"] == 1.0
    assert (after.characters, after.han, after.documents) == (4, 4, 1)
    assert measure_density(base, [""]).figures()["tokens_per_character"] is None


def test_round_trip_failures_are_counted(base: Encoder) -> None:
    assert measure_density(base, [*TEXTS, "a▁b"]).round_trip_failures == 1


def test_dead_pieces_are_found(base: Encoder, clean: Encoder, flawed: Encoder) -> None:
    assert find_dead(base) == find_dead(clean) == {"fast": [], "slow": []}
    assert find_dead(flawed, base.num_ids)["slow"] == ["國家大事"]


def test_drift_is_found_and_shown(base: Encoder, clean: Encoder, flawed: Encoder) -> None:
    scripts = ("han", "cjk_punctuation")
    lines = ["the wolf went away", "an apple", "山水"]
    assert find_drift(base, clean, lines, scripts)["changed"] == 0
    drift = find_drift(base, flawed, lines, scripts)
    assert (drift["lines"], drift["changed"]) == (2, 1)
    (example,) = drift["examples"]
    assert example["text"] == "the wolf went away"
    assert example["before"] != example["after"]


def test_disparity_is_found(base: Encoder, flawed: Encoder) -> None:
    # 天地人: SentencePiece takes the leftmost of two merges with score 0, the list the first one.
    found = find_disparity(flawed, ["天地人", "天地"])
    assert found is not None
    assert (found["documents"], found["different"]) == (2, 1)
    assert found["examples"][0]["before"] == ["▁", "天地", "人"]
    assert found["examples"][0]["after"] == ["▁", "天", "地人"]
    assert find_disparity(Encoder(base.backend, None, base.num_ids), TEXTS) is None


def test_special_tokens_spelt_in_a_text_are_text(base: Encoder) -> None:
    found = find_disparity(base, ["the end</s> of <unk> <s>"])
    assert found is not None
    assert found["different"] == 0
    assert measure_density(base, ["the end</s> of <unk> <s>"]).round_trip_failures == 0


def test_characters_without_a_token(clean: Encoder) -> None:
    assert count_spelt_in_bytes(clean, ["魚魚山 鳥\n"], 5) == [["魚", 2], ["鳥", 1]]
    assert count_spelt_in_bytes(clean, ["魚魚山 鳥\n"], 1) == [["魚", 2]]


def test_audit_is_json_and_its_page_is_whole(small_base: bytes, base: Encoder) -> None:
    pieces = train_pieces(TEXTS * 3, 30)
    merged = merge_clean(small_base, pieces)
    shorter = merge_clean(small_base, truncate_model(pieces, 25, "pieces"))
    subject = Subject(
        base,
        Encoder.of_model(merged.model_bytes),
        ("han", "cjk_punctuation"),
        merged.dropped,
        merged.intermediates,
        30,
        [Candidate(25, Encoder.of_model(shorter.model_bytes))],
    )
    steps: list[str] = []
    sources = {"zh & <b>": TEXTS}
    result = audit(subject, sources, TEXTS, 64, lambda rows: (1e6, 100.0 * rows), steps.append)
    assert steps[0] == "dead pieces"
    assert json.loads(json.dumps(result)) is not None
    assert sum(result["pieces"]["by_length"].values()) == result["pieces"]["added"]
    base_point, _, last = result["curve"]
    expected = last["tokens_per_character"] * (1e6 + 100 * last["rows"])
    reference = base_point["tokens_per_character"] * (1e6 + 100 * base_point["rows"])
    assert last["relative_flops"] == pytest.approx(expected / reference)
    assert [tile["count"] for tile in judge(result)] == [0, 0, 0, 0]
    page = render_page(result, "Title <i>", {"Base": "a & b"})
    assert "zh &amp; &lt;b&gt;" in page
    assert "Title &lt;i&gt;" in page
    assert "<script" not in page
    assert page.count("<svg") == 2
    assert summarise(result).row_count == 1


def test_without_sources_the_sentences_are_the_source(base: Encoder, clean: Encoder) -> None:
    subject = Subject(base, clean, ("han",))
    result = audit(subject, {}, ["今天"], 64, lambda rows: (1.0, 1.0))
    assert list(result["sources"]) == ["sample sentences"]
    assert audit(subject, {}, [], 64, lambda rows: (1.0, 1.0))["curve"][1]["relative_flops"] is None


def test_bpe_model_is_cut_without_losing_its_characters() -> None:
    whole = train_pieces(TEXTS * 3, 30)
    short = proto.ModelProto.FromString(truncate_model(whole, 26, "pieces"))
    characters = {c for text in TEXTS for c in text if not c.isascii()}
    assert len(short.pieces) == 26
    assert characters <= {piece.piece for piece in short.pieces}


def test_numbers_as_text() -> None:
    assert [show_number(x) for x in (None, 12345, 0.5)] == ["–", "12,345", "0.500"]
