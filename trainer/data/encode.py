"""Text to token ids, exactly as the fast tokenizer gives them, in less time.

A BPE tokenizer without a pre-tokenizer (LLaMA, Mistral and their extensions) sees a document as
one word. No merge can cross a pair of neighbouring characters that stands inside no piece of the
vocabulary, so such pairs are safe places to cut: the pieces between them are encoded apart, once
each, and looked up from then on. Every other tokenizer is asked directly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAIR_TABLE_BITS = 22  # a colliding pair only means one cut less
PAIR_FACTOR = np.uint32(0x9E3779B1)  # 2**32 / golden ratio: Knuth, TAOCP vol. 3, section 6.4
MAX_CACHED_PIECES = 1 << 19  # about 100 MB of a process
MAX_CACHED_CHARS = 24  # longer pieces hardly ever recur


@dataclass(frozen=True)
class EncoderSpec:
    """A fast tokenizer as plain data: worker processes rebuild it without transformers."""

    backend_json: str
    num_ids: int
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int  # the tokenizer's, else its end token, else 0

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> EncoderSpec:
        """Describe a loaded tokenizer."""
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return cls(
            backend_json=tokenizer.backend_tokenizer.to_str(),
            num_ids=max(tokenizer.get_vocab().values()) + 1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=next(pad for pad in pads if pad is not None),
        )


class Encoder:
    """Encode documents as the bytes of their ids, with the start and end token around each.

    Args:
        spec: what ``EncoderSpec.of`` made of a fast tokenizer.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        self.backend = Tokenizer.from_str(spec.backend_json)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.dtype = token_dtype(spec.num_ids)
        self._start = self._pack([spec.bos_token_id])
        self._end = self._pack([spec.eos_token_id])
        self._spec: dict[str, Any] = json.loads(self.backend.to_str())
        self._cutter = PieceCutter(self._spec) if is_cuttable(self._spec) else None
        added = [re.escape(token["content"]) for token in self._spec["added_tokens"]]
        self._added_token = re.compile("|".join(added)) if added else None
        self._cache = _PieceCache(self)

    def _pack(self, ids: Sequence[int | None]) -> bytes:
        return np.array([i for i in ids if i is not None], self.dtype).tobytes()

    def encode(self, texts: list[str]) -> list[bytes]:
        """Return, for each text, its ids as little-endian ``self.dtype`` values."""
        if self._cutter is None:
            return self._encode_directly(texts)
        direct = [i for i, text in enumerate(texts) if self._holds_added_token(text)]
        encoded = dict(zip(direct, self._encode_directly([texts[i] for i in direct]), strict=True))
        lookup = self._cache.__getitem__
        for i, text in enumerate(texts):
            if i not in encoded:
                ids = b"".join(map(lookup, self._cutter.cut(text)))
                encoded[i] = self._start + ids + self._end
        return [encoded[i] for i in range(len(texts))]

    def _holds_added_token(self, text: str) -> bool:
        return self._added_token is not None and self._added_token.search(text) is not None

    def _encode_directly(self, texts: list[str]) -> list[bytes]:
        batch = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [self._start + self._pack(encoding.ids) + self._end for encoding in batch]

    def encode_piece(self, piece: str) -> bytes:
        """Return the ids of a normalised piece of text, without start and end tokens."""
        return self._pack([token.id for token in self.backend.model.tokenize(piece)])


class _PieceCache(dict[str, bytes]):
    """Ids of pieces seen before; emptied when full, since texts change their words slowly."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def __missing__(self, piece: str) -> bytes:
        ids = self._encoder.encode_piece(piece)
        if len(piece) <= MAX_CACHED_CHARS:
            if len(self) >= MAX_CACHED_PIECES:
                self.clear()
            self[piece] = ids
        return ids


class PieceCutter:
    """Normalise a text and cut it where no merge can cross."""

    def __init__(self, spec: dict[str, Any]) -> None:
        parts = _normaliser_parts(spec["normalizer"])
        if parts is None:
            raise ValueError(f"normaliser {spec['normalizer']} cannot be cut; see is_cuttable")
        self._prefix, self._replace = parts
        vocab = [piece for piece in spec["model"]["vocab"] if len(piece) > 1]
        joined = np.frombuffer("\n".join(vocab).encode("utf-32-le"), np.uint32)
        # Pairs across the separator are marked too: two cuts less, next to newlines, are no harm.
        self._inside_a_piece = np.zeros(1 << PAIR_TABLE_BITS, bool)
        self._inside_a_piece[_pair_keys(joined)] = True

    def cut(self, text: str) -> list[str]:
        """Return the pieces of the normalised text, in order."""
        for old, new in self._replace:
            text = text.replace(old, new)
        text = self._prefix + text
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        cuts = (np.flatnonzero(~self._inside_a_piece[_pair_keys(codes)]) + 1).tolist()
        return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def _pair_keys(codes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Hash each pair of neighbours. codes [n] -> [n - 1]."""
    mixed = (codes[:-1] * PAIR_FACTOR) ^ codes[1:]
    return (mixed * PAIR_FACTOR) >> np.uint32(32 - PAIR_TABLE_BITS)


def token_dtype(num_ids: int) -> np.dtype[Any]:
    """Return the smallest unsigned little-endian type for ids below ``num_ids``."""
    return np.dtype("<u2" if num_ids <= 1 << 16 else "<u4")


def is_cuttable(spec: dict[str, Any]) -> bool:
    """Tell whether cutting between merge-free pairs is proven to keep this tokenizer's ids.

    Needed: plain BPE in which every unknown character falls back to its bytes (otherwise
    neighbouring unknowns may fuse), no pre-tokenizer, and a normaliser that treats each character
    alone.
    """
    model, vocab = spec["model"], spec["model"].get("vocab", {})
    return (
        model["type"] == "BPE"
        and spec["pre_tokenizer"] is None
        and _normaliser_parts(spec["normalizer"]) is not None
        and not any(token["normalized"] for token in spec["added_tokens"])
        and bool(model.get("byte_fallback"))
        and all(f"<0x{byte:02X}>" in vocab for byte in range(256))
        and not model.get("dropout")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
    )


def _normaliser_parts(spec: dict[str, Any] | None) -> tuple[str, list[tuple[str, str]]] | None:
    """Return prefix and replacements of SentencePiece's identity normaliser, else None."""
    parts = [] if spec is None else spec.get("normalizers", [spec])
    prefix, replace = "", []
    for i, part in enumerate(parts):
        if part["type"] == "Prepend" and i == 0:
            prefix = part["prepend"]
        elif part["type"] == "Replace" and len(part["pattern"].get("String", "")) == 1:
            replace.append((part["pattern"]["String"], part["content"]))
        else:
            return None
    return prefix, replace
