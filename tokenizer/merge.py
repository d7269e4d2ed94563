"""Merge new pieces into a base SentencePiece-BPE model.

In SentencePiece-BPE a score is a merge priority, and a piece exists for the encoder only if its
characters merge into it step by step through pieces that exist. A donor vocabulary (a unigram
model above all) therefore holds pieces that would be *dead* in the merged model: rows in both
vocabulary matrices that no text can reach.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from tokenizer.scripts import DEFAULT_SCRIPTS, run_pattern
from tokenizer.spm import CONTROL, NORMAL, USER_DEFINED, parse_model, require_bpe_base
from trainer.errors import DataError

# LLaMA gives its runs of spaces the score -1e9, where float32 no longer holds distinct ranks.
LOWEST_RANK_SCORE = -1e6


@dataclass(frozen=True)
class Merge:
    """A merged model and what became of the donor's pieces."""

    model_bytes: bytes
    added: list[str]  # pieces appended, in order of id
    intermediates: list[str] = field(default_factory=list)  # of these, only there to reach others
    dropped: dict[str, list[str]] = field(default_factory=dict)  # reason → donor pieces left out


def merge_compatible(base: bytes, pieces: bytes, extra_pieces: Sequence[str] = ()) -> Merge:
    """Append every piece the base lacks, in order, as Chinese-LLaMA's published files have it.

    Score 0 and the ``type`` field left unset: writing the default type would add two bytes a piece
    (https://github.com/ymcui/Chinese-LLaMA-Alpaca, SHA256.md, lists the hashes of the results).
    Dead pieces and changes in text without CJK come with it; the audit counts them.

    Args:
        base: bytes of the base model.
        pieces: bytes of the model whose pieces are appended.
        extra_pieces: further pieces appended in the same way, such as ``[PAD]``.

    Raises:
        DataError: the base is not BPE with byte fallback, or one of the two is no model.
    """
    merged, donor = _parse_both(base, pieces)
    known = {piece.piece for piece in merged.pieces}
    added = []
    for text in [*(piece.piece for piece in donor.pieces), *extra_pieces]:
        if text not in known:
            known.add(text)
            added.append(text)
            merged.pieces.add(piece=text, score=0.0)
    return Merge(merged.SerializeToString(), added)


def merge_clean(
    base: bytes,
    pieces: bytes,
    scripts: Sequence[str] = DEFAULT_SCRIPTS,
    dead_pieces: Literal["drop", "revive"] = "drop",
    extra_pieces: Sequence[str] = (),
) -> Merge:
    """Append the donor's pieces that consist of ``scripts`` only and that an encoder can reach.

    The new pieces keep the donor's order (best score first) and get distinct scores below every
    merge of the base, so the base's merges go first and no two different pieces tie. A text
    without a character of ``scripts`` cannot contain a new piece: its encoding does not change.

    Args:
        base: bytes of the base model.
        pieces: bytes of the donor model.
        scripts: classes of ``tokenizer.scripts`` (``all``: no filter, then other text changes).
        dead_pieces: ``drop`` pieces that cannot be reached, or ``revive`` them by appending the
            intermediate pieces that lead to them.
        extra_pieces: appended last as control pieces (never produced from text). ``[PAD]`` or
            ``<pad>`` becomes the padding token.

    Raises:
        DataError: the base is not BPE with byte fallback, one of the two is no model, or nothing
            is left to add.
    """
    merged, donor = _parse_both(base, pieces)
    known = {piece.piece for piece in merged.pieces}
    wanted, dropped = _select(donor, known, tuple(scripts))
    scores = {p.piece: p.score for p in merged.pieces if p.type == NORMAL}
    ranks = _Ranks(scores)
    if dead_pieces == "revive":
        for character in dict.fromkeys("".join(wanted)):
            ranks.append(character)
    for text in wanted:
        ranks.append(text)
    dead = [text for text in wanted if len(segment(text, scores)) > 1]
    if dead_pieces == "drop":
        dropped["dead"] = dead
        added = [text for text in ranks.new if text not in set(dead)]
    else:
        for text in dead:
            ranks.revive(text)
        added = ranks.new
    if not added:
        raise DataError(
            f"the {len(donor.pieces)} pieces hold nothing to add in scripts {', '.join(scripts)}; "
            "choose other stage.scripts or another stage.pieces"
        )
    for text in added:
        merged.pieces.add(piece=text, score=scores[text], type=NORMAL)
    controls = _append_controls(merged, extra_pieces, known | set(added))
    intermediates = sorted(set(added) - set(wanted), key=added.index)
    return Merge(merged.SerializeToString(), added + controls, intermediates, dropped)


def segment(text: str, scores: dict[str, float]) -> list[str]:
    """Split a text as SentencePiece-BPE does, without prefix: merge the best pair, leftmost first.

    A character that is no piece merges with nothing (it would be spelt in bytes).
    """
    parts = list(text)
    while True:
        best, where = float("-inf"), -1
        for i, (left, right) in enumerate(pairwise(parts)):
            if left in scores and right in scores and scores.get(left + right, best) > best:
                best, where = scores[left + right], i
        if where < 0:
            return parts
        parts[where : where + 2] = [parts[where] + parts[where + 1]]


class _Ranks:
    """Hand out distinct, descending scores below all merges of the base."""

    def __init__(self, scores: dict[str, float]) -> None:
        self.scores = scores
        self.new: list[str] = []
        self.floor = min((s for s in scores.values() if s > LOWEST_RANK_SCORE), default=0.0)

    def append(self, text: str) -> None:
        """Add a piece with the next lower score, unless it is one already."""
        if text not in self.scores:
            self.new.append(text)
            self.scores[text] = float(int(self.floor) - len(self.new))

    def revive(self, text: str) -> None:
        """Add the pieces through which ``text`` is reached, from its left end.

        They come after every earlier merge, so what was reachable stays so. After each one the
        text is split again, because the new piece may occur in it more than once.
        """
        while len(parts := segment(text, self.scores)) > 1:
            self.append(parts[0] + parts[1])


def _parse_both(base: bytes, pieces: bytes) -> tuple[Any, Any]:
    merged = parse_model(base, "stage.base_tokenizer")
    require_bpe_base(merged, "stage.base_tokenizer")
    return merged, parse_model(pieces, "stage.pieces")


def _select(
    donor: Any, known: set[str], scripts: tuple[str, ...]
) -> tuple[list[str], dict[str, list[str]]]:
    """Return the donor's pieces to add, best score first, and the others by reason."""
    pattern = run_pattern(scripts)
    ordinary = [p for p in donor.pieces if p.type in (NORMAL, USER_DEFINED)]
    ordered = dict.fromkeys(p.piece for p in sorted(ordinary, key=lambda p: -p.score))
    wanted: list[str] = []
    dropped: dict[str, list[str]] = {"in the base": [], "other scripts": []}
    for text in ordered:
        if text in known:
            dropped["in the base"].append(text)
        elif pattern.fullmatch(text):
            wanted.append(text)
        else:
            dropped["other scripts"].append(text)
    return wanted, dropped


def _append_controls(merged: Any, texts: Iterable[str], known: set[str]) -> list[str]:
    """Append control pieces that are not there yet; name the padding token in the model."""
    controls = [text for text in dict.fromkeys(texts) if text not in known]
    for text in controls:
        if text.strip("[]<>|").lower() == "pad":
            merged.trainer_spec.pad_id = len(merged.pieces)
            merged.trainer_spec.pad_piece = text
        merged.pieces.add(piece=text, score=0.0, type=CONTROL)
    return controls
