"""SentencePiece models as data: parse and check them, and build the equal fast tokenizer.

SentencePiece-BPE merges, again and again, the adjacent pair whose concatenation is the piece with
the highest score (the leftmost such pair on a tie), starting from single characters. The
``tokenizers`` library wants the same rule as a ranked list of merges: every split of every piece
into two pieces, ordered by score.
"""

from __future__ import annotations

from typing import Any

from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from trainer.errors import DataError

SPACE = "▁"  # U+2581 stands for a space inside pieces
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # sentencepiece_model.proto
UNIGRAM_TYPE, BPE_TYPE = 1, 2
MODEL_TYPE_NAMES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


def parse_model(model_bytes: bytes, origin: str) -> Any:
    """Parse SentencePiece bytes into their ``ModelProto``.

    Args:
        model_bytes: content of a ``.model`` file.
        origin: where they come from, for messages.

    Raises:
        DataError: empty, not a SentencePiece model, or a model without pieces.
    """
    if not model_bytes:
        raise DataError(f"{origin} is empty; give a SentencePiece model (.model)")
    model = proto.ModelProto()
    try:
        model.ParseFromString(model_bytes)
    except Exception as error:  # DecodeError lives in another module in each protobuf version
        raise DataError(f"{origin} is not a SentencePiece model ({error})") from error
    if not model.pieces or not model.trainer_spec.model_type:
        raise DataError(f"{origin} is not a SentencePiece model: it holds no pieces")
    return model


def require_bpe_base(model: Any, origin: str) -> None:
    """Check that a model can serve as the base of an extension: BPE with byte fallback.

    Raises:
        DataError: naming the model type or the missing byte pieces.
    """
    kind = model.trainer_spec.model_type
    if kind != BPE_TYPE:
        raise DataError(
            f"{origin} is a SentencePiece {MODEL_TYPE_NAMES.get(kind, kind)} model; a base must be "
            "BPE with byte fallback, as LLaMA's is (this one can be given as stage.pieces)"
        )
    if sum(piece.type == BYTE for piece in model.pieces) != 256:
        raise DataError(
            f"{origin} has no byte fallback (256 byte pieces); without it a text with an unknown "
            "character does not survive a round trip; use a base trained with byte_fallback"
        )


def truncate_model(model_bytes: bytes, num_pieces: int, origin: str) -> bytes:
    """Return the model with its ``num_pieces`` best pieces, in their old order.

    Of a BPE model the single characters count as the best: everything is built from them, though
    training lists them last.

    Raises:
        DataError: it has fewer.
    """
    model = parse_model(model_bytes, origin)
    if num_pieces > len(model.pieces):
        raise DataError(
            f"stage.vocab_size={num_pieces}: {origin} has {len(model.pieces)} pieces; "
            "use at most that, or null for all of them"
        )
    is_bpe = model.trainer_spec.model_type == BPE_TYPE

    def worth(index: int) -> tuple[bool, bool, float]:
        piece = model.pieces[index]
        return piece.type == NORMAL, len(piece.piece) > 1 if is_bpe else False, -piece.score

    best = sorted(sorted(range(len(model.pieces)), key=worth)[:num_pieces])
    kept = [model.pieces[index] for index in best]
    shorter = proto.ModelProto()
    shorter.CopyFrom(model)
    del shorter.pieces[:]
    shorter.pieces.extend(kept)
    return bytes(shorter.SerializeToString())


def processor_from(model_bytes: bytes) -> SentencePieceProcessor:
    """Return SentencePiece's own encoder for the bytes of a model."""
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(model_bytes)
    return processor


def build_fast_tokenizer(model_bytes: bytes, origin: str) -> PreTrainedTokenizerFast:
    """Build the ``tokenizers`` equivalent of a SentencePiece model.

    The dummy prefix is SentencePiece's: one ``▁`` before any non-empty text, even one that begins
    with a space. The start token is prepended when special tokens are asked for.

    Raises:
        DataError: not a SentencePiece model, or of a type other than BPE and unigram.
    """
    model = parse_model(model_bytes, origin)
    try:
        return _build(model, origin)
    except DataError:
        raise
    except Exception as error:  # ids out of range here, and whatever the Rust side finds wrong
        raise DataError(f"{origin} is damaged: no tokenizer can be made of it ({error})") from error


def _build(model: Any, origin: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(_backend_model(model, origin))
    backend.normalizer = _normalizer(model)
    backend.decoder = _decoder(model)
    spec = model.trainer_spec
    names = {"unk": spec.unk_id, "bos": spec.bos_id, "eos": spec.eos_id, "pad": spec.pad_id}
    special = {f"{k}_token": model.pieces[i].piece for k, i in names.items() if i >= 0}
    backend.add_special_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=True)
            for piece in model.pieces
            if piece.type in (CONTROL, UNKNOWN)
        ]
    )
    backend.add_tokens(
        [AddedToken(p.piece, normalized=False) for p in model.pieces if p.type == USER_DEFINED]
    )
    if bos := special.get("bos_token"):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, spec.bos_id)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special
    )


def merge_ranks(model: Any) -> list[tuple[str, str]]:
    """Return every way to form a piece from two, in the order in which SentencePiece prefers them.

    Ties in score keep the order of the vocabulary; the splits of one piece go from short to long
    left half. (SentencePiece breaks ties by position in the text, which a ranked list cannot say;
    distinct scores leave no tie between different pieces.)
    """
    mergeable = {p.piece for p in model.pieces if p.type in (NORMAL, UNUSED)}
    ranked = sorted((p for p in model.pieces if p.type in (NORMAL, UNUSED)), key=lambda p: -p.score)
    merges = []
    for text in (piece.piece for piece in ranked):
        for cut in range(1, len(text)):
            if text[:cut] in mergeable and text[cut:] in mergeable:
                merges.append((text[:cut], text[cut:]))
    return merges


def _backend_model(model: Any, origin: str) -> BPE | Unigram:
    kind = model.trainer_spec.model_type
    byte_fallback = any(piece.type == BYTE for piece in model.pieces)
    if kind == UNIGRAM_TYPE:
        vocab = [(piece.piece, piece.score) for piece in model.pieces]
        return Unigram(vocab, unk_id=model.trainer_spec.unk_id, byte_fallback=byte_fallback)
    if kind != BPE_TYPE:
        raise DataError(
            f"{origin} is a SentencePiece {MODEL_TYPE_NAMES.get(kind, kind)} model; "
            "only bpe and unigram can be loaded"
        )
    ids = {piece.piece: index for index, piece in enumerate(model.pieces)}
    unknown = model.pieces[model.trainer_spec.unk_id].piece
    return BPE(
        ids, merge_ranks(model), unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback
    )


def _normalizer(model: Any) -> Any:
    spec = model.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _decoder(model: Any) -> Any:
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    return decoders.Sequence(steps)
