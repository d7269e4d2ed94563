"""Merge new pieces into a base SentencePiece model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizer.spm import parse_model, require_bpe_base


def merge_compatible(base: bytes, pieces: bytes, extra_pieces: Sequence[str] = ()) -> bytes:
    """Append every piece the base lacks, in order, as Chinese-LLaMA's published files have it.

    Score 0 and the ``type`` field left unset: writing the default type would add two bytes a piece
    (https://github.com/ymcui/Chinese-LLaMA-Alpaca, SHA256.md, lists the hashes of the results).

    Args:
        base: bytes of the base model.
        pieces: bytes of the model whose pieces are appended.
        extra_pieces: further pieces appended in the same way, such as ``[PAD]``.

    Returns:
        Bytes of the merged model.
    """
    merged = parse_model(base, "the base tokenizer")
    require_bpe_base(merged, "the base tokenizer")
    donor = parse_model(pieces, "the pieces")
    append_unscored(merged, [piece.piece for piece in donor.pieces])
    append_unscored(merged, extra_pieces)
    return merged.SerializeToString()


def append_unscored(merged: object, texts: Iterable[str]) -> None:
    """Append the texts that are not yet pieces, with score 0 and no type."""
    known = {piece.piece for piece in merged.pieces}  # type: ignore[attr-defined]
    for text in texts:
        if text not in known:
            known.add(text)
            merged.pieces.add(piece=text, score=0.0)  # type: ignore[attr-defined]
