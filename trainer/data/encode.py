"""Text to token ids, exactly as the fast tokenizer gives them, in less time.

A BPE tokenizer without a pre-tokenizer (LLaMA, Mistral and their extensions) sees a document as
one word. No merge can cross a pair of neighbouring characters that stands inside no piece of the
vocabulary, so such pairs are safe places to cut: the pieces between them are encoded apart, once
each, and looked up from then on. Every other tokenizer is asked directly.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAIR_TABLE_BITS = 22  # a colliding pair only means one cut less
PAIR_FACTOR = np.uint32(0x9E3779B1)  # 2**32 / golden ratio: Knuth, TAOCP vol. 3, section 6.4
MAX_POOL_IDS = 1 << 21  # some 100 MB of a process with their pieces
NUM_CODE_POINTS = 0x110000


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

    @property
    def encoder(self) -> EncoderSpec:
        """Itself, as the tokenizer of a ``ChatSpec`` is."""
        return self

    def build(self) -> Encoder:
        """Return what encodes texts."""
        return Encoder(self)


class Encoder:
    """Encode documents as the bytes of their ids, with the start and end token around each.

    Args:
        spec: what ``EncoderSpec.of`` made of a fast tokenizer.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        self._backend = Tokenizer.from_str(spec.backend_json)
        self._backend.no_truncation()
        self._backend.no_padding()
        # A text that merely spells "</s>" must not end a document.
        self._backend.encode_special_tokens = True
        self.dtype = token_dtype(spec.num_ids)
        self._start = self._pack([spec.bos_token_id])
        self._end = self._pack([spec.eos_token_id])
        backend = json.loads(spec.backend_json)
        self._cutter = PieceCutter(backend, self._backend) if is_cuttable(backend) else None
        self._pool = PiecePool(self._backend, self.dtype)
        added = [re.escape(token["content"]) for token in backend["added_tokens"]]
        self._added_token = re.compile("|".join(added)) if added else None

    def _pack(self, ids: Sequence[int | None]) -> bytes:
        return np.array([i for i in ids if i is not None], self.dtype).tobytes()

    def encode(self, texts: list[str]) -> list[bytes]:
        """Return, for each text, its ids as little-endian ``self.dtype`` values."""
        if self._cutter is None:
            return self._encode_directly(texts)
        # An added token written out in a text cuts it before it is normalised: rare, and slower.
        direct = [i for i, text in enumerate(texts) if self._holds_added_token(text)]
        encoded = dict(zip(direct, self._encode_directly([texts[i] for i in direct]), strict=True))
        others = [i for i in range(len(texts)) if i not in encoded]
        encoded.update(zip(others, self._encode_cut([texts[i] for i in others]), strict=True))
        return [encoded[i] for i in range(len(texts))]

    def _holds_added_token(self, text: str) -> bool:
        return self._added_token is not None and self._added_token.search(text) is not None

    def _encode_directly(self, texts: list[str]) -> list[bytes]:
        batch = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [self._start + self._pack(encoding.ids) + self._end for encoding in batch]

    def _encode_cut(self, texts: list[str]) -> list[bytes]:
        """Encode all texts as one, cut between them and wherever no merge can cross."""
        if self._cutter is None or not texts:
            return []
        normal = [self._cutter.normalise(text) for text in texts]
        text_ends = np.cumsum([len(text) for text in normal])
        joined = "".join(normal)
        ids, ends = self._pool.encode(joined, self._cutter.cuts(joined, text_ends), text_ends)
        bounds = [0, *ends.tolist()]
        return [
            self._start + ids[begin:end].tobytes() + self._end for begin, end in pairwise(bounds)
        ]


class PieceCutter:
    """Normalise a text and find where no merge can cross."""

    def __init__(self, spec: dict[str, Any], backend: Tokenizer) -> None:
        self._normaliser = backend.normalizer
        self._parts = _normaliser_parts(spec["normalizer"])
        vocab = [piece for piece in spec["model"]["vocab"] if len(piece) > 1]
        # Pairs across the separator are marked too: two cuts less, next to newlines, are no harm.
        self._inside_a_piece = np.zeros(1 << PAIR_TABLE_BITS, bool)
        self._inside_a_piece[_pair_keys(code_points("\n".join(vocab)))] = True

    def normalise(self, text: str) -> str:
        """Return the text as the tokenizer's model sees it."""
        if self._parts is None:
            return str(self._normaliser.normalize_str(text))
        prefix, replacements = self._parts
        for old, new in replacements:
            text = text.replace(old, new)
        return prefix + text

    def cuts(self, text: str, text_ends: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the ends of the pieces of ``text``, those of its parts among them. -> [pieces]"""
        if not text:
            return np.empty(0, np.int64)
        is_end = np.ones(len(text), bool)
        is_end[:-1] = ~self._inside_a_piece[_pair_keys(code_points(text))]
        is_end[text_ends - 1] = True
        return np.flatnonzero(is_end) + 1


class PiecePool:
    """Ids of the pieces seen so far, in flat arrays that a whole batch is gathered from.

    Emptied when full: texts change their words slowly.
    """

    def __init__(self, backend: Tokenizer, dtype: np.dtype[Any]) -> None:
        self._model, self._dtype = backend.model, dtype
        self._clear()

    def _clear(self) -> None:
        self._index = _Index(self._add)
        self._ids: array[int] = array("I")
        self._starts: array[int] = array("q", [0])
        self._of_character = np.full(NUM_CODE_POINTS, -1, np.int32)

    def encode(
        self, text: str, ends: NDArray[np.int64], text_ends: NDArray[np.int64]
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Encode ``text``, cut at ``ends``.

        Returns:
            ids of the whole text, and for each of ``text_ends`` the number of ids before it.
        """
        if len(self._ids) > MAX_POOL_IDS:
            self._clear()
        pieces = self._look_up(text, ends)
        all_ids = np.frombuffer(self._ids, np.uint32)
        all_starts = np.frombuffer(self._starts, np.int64)
        starts, lengths = all_starts[pieces], all_starts[pieces + 1] - all_starts[pieces]
        id_ends = np.concatenate([[0], np.cumsum(lengths)])
        # Position in the pool of each id: its piece's start, plus its place within the piece.
        places = np.repeat(starts - id_ends[:-1], lengths) + np.arange(id_ends[-1])
        # A text that its normaliser left nothing of ends where the one before it ends.
        num_pieces = np.searchsorted(ends, text_ends, side="right")
        return all_ids[places].astype(self._dtype), id_ends[num_pieces]

    def _look_up(self, text: str, ends: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the index of each piece in the pool, adding those that are new. -> [pieces]"""
        begins = np.concatenate([[0], ends])[:-1].astype(np.int64)
        single = ends - begins == 1
        codes = code_points(text)[begins[single]]
        for code in np.unique(codes[self._of_character[codes] < 0]).tolist():
            self._of_character[code] = self._add(chr(code))
        found = np.empty(len(ends), np.int64)
        found[single] = self._of_character[codes]
        spans = zip(begins[~single].tolist(), ends[~single].tolist(), strict=True)
        words = [text[begin:end] for begin, end in spans]
        found[~single] = np.fromiter(map(self._index.__getitem__, words), np.int64, len(words))
        return found

    def _add(self, piece: str) -> int:
        self._ids.extend(token.id for token in self._model.tokenize(piece))
        self._starts.append(len(self._ids))
        return len(self._starts) - 2


class _Index(dict[str, int]):
    """Where each piece stands in the pool; a new one is added when it is first asked for."""

    def __init__(self, add: Callable[[str], int]) -> None:
        self._add = add

    def __missing__(self, piece: str) -> int:
        self[piece] = self._add(piece)
        return self[piece]


def code_points(text: str) -> NDArray[np.uint32]:
    """Return the characters of ``text`` as numbers. -> [characters]"""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


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
    neighbouring unknowns may fuse) and no pre-tokenizer.
    """
    model, vocab = spec["model"], spec["model"].get("vocab", {})
    return (
        model["type"] == "BPE"
        and spec["pre_tokenizer"] is None
        and not any(token["normalized"] for token in spec["added_tokens"])
        and bool(model.get("byte_fallback"))
        and all(f"<0x{byte:02X}>" in vocab for byte in range(256))
        and not model.get("dropout")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
    )


def _normaliser_parts(spec: dict[str, Any] | None) -> tuple[str, list[tuple[str, str]]] | None:
    """Return prefix and replacements of SentencePiece's identity normaliser, else None.

    The two are done here in no time; any other normaliser is asked, which takes longer.
    """
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
