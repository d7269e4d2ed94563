"""Measurements of one tokenizer, or of two against each other, on lists of texts."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor
from tokenizers import Encoding, Tokenizer

from tokenizer.extend_bpe import byte_alphabet, read_spelling
from tokenizer.load import load_tokenizer, num_ids, sentencepiece_file
from tokenizer.scripts import run_pattern, script_of
from tokenizer.spm import SPACE, build_fast_tokenizer, processor_from

BATCH_CHARS = 1 << 20  # characters encoded at once
NUM_EXAMPLES = 5
CONTEXT_TOKENS = 6  # shown after a difference
NUM_TEXT_CHARS = 120  # of an example


@dataclass(frozen=True)
class Encoder:
    """A tokenizer as ``tokenizers`` runs it and, where there is one, its SentencePiece model."""

    backend: Tokenizer
    slow: SentencePieceProcessor | None
    num_ids: int

    def __post_init__(self) -> None:
        """Take ``</s>`` in a document for text, as SentencePiece does, not for the end token."""
        self.backend.encode_special_tokens = True

    @classmethod
    def load(cls, path: str | Path) -> Encoder:
        """Load both sides of the tokenizer at ``path``."""
        tokenizer, model_file = load_tokenizer(path), sentencepiece_file(path)
        slow = processor_from(model_file.read_bytes()) if model_file else None
        return cls(tokenizer.backend_tokenizer, slow, num_ids(tokenizer))

    @classmethod
    def of_model(cls, model_bytes: bytes) -> Encoder:
        """Return both sides of a SentencePiece model."""
        tokenizer = build_fast_tokenizer(model_bytes, "the merged model")
        slow = processor_from(model_bytes)
        return cls(tokenizer.backend_tokenizer, slow, num_ids(tokenizer))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that text does not produce: added tokens, control, unknown and byte pieces."""
        ids = set(self.backend.get_added_tokens_decoder())
        if self.slow is not None:
            known = range(self.slow.piece_size())
            ids |= {i for i in known if self.slow.is_control(i) or self.slow.is_unknown(i)}
            ids |= {i for i in known if self.slow.is_byte(i)}
        return frozenset(ids)

    def spelling(self, index: int) -> str | None:
        """Return the text of a token, or None for a special one and for a part of a character."""
        token = self.backend.id_to_token(index)
        if token is None or index in self.special_ids:
            return None
        if self.slow is not None or not set(token) <= set(byte_alphabet()):
            return token.replace(SPACE, " ")
        try:
            return read_spelling(token).decode()
        except UnicodeDecodeError:
            return None

    def encode(self, texts: Sequence[str]) -> Iterator[Encoding]:
        """Encode without special tokens, a bounded number of characters at once."""
        batch: list[str] = []
        size = 0
        for text in texts:
            batch.append(text)
            size += len(text)
            if size > BATCH_CHARS:
                yield from self.backend.encode_batch(batch, add_special_tokens=False)
                batch, size = [], 0
        yield from self.backend.encode_batch(batch, add_special_tokens=False)

    def show(self, ids: Sequence[int]) -> list[str]:
        """Return tokens as a reader wants to see them: bytes as ``<0xE4>``, spaces as ``▁``."""
        return [(self.spelling(i) or self._show_part(i)).replace(" ", SPACE) for i in ids]

    def _show_part(self, index: int) -> str:
        token = self.backend.id_to_token(index) or f"<id {index}>"
        if self.slow is not None or index in self.special_ids:
            return token
        return "".join(f"<0x{byte:02X}>" for byte in read_spelling(token))


@dataclass(frozen=True)
class Density:
    """How many tokens some text takes."""

    documents: int
    characters: int
    han: int
    tokens: int
    han_tokens: int  # tokens that begin in a Han character
    byte_tokens: int  # tokens that spell a part of a character
    round_trip_failures: int

    def figures(self) -> dict[str, Any]:
        """Return the counts and the ratios made of them (None where nothing is to divide)."""
        return {
            **asdict(self),
            "tokens_per_character": self.tokens / self.characters if self.characters else None,
            "characters_per_token": self.characters / self.tokens if self.tokens else None,
            "tokens_per_han": self.han_tokens / self.han if self.han else None,
        }


def measure_density(encoder: Encoder, texts: Sequence[str]) -> Density:
    """Count tokens, and texts that do not come back from their ids."""
    counts: Counter[str] = Counter()
    spellings = [encoder.spelling(index) for index in range(encoder.num_ids)]
    partial = np.array([spelling is None for spelling in spellings])
    blank = np.array([spelling is not None and not spelling.strip() for spelling in spellings])
    for text, encoding in zip(texts, encoder.encode(texts), strict=True):
        is_han = np.fromiter((script_of(c) == "han" for c in text), dtype=bool, count=len(text))
        # The dummy prefix is given the place of the first character, which it is not.
        ids = np.array(encoding.ids, dtype=np.int64)
        starts = np.fromiter((s for s, _ in encoding.offsets), dtype=np.int64, count=len(ids))
        counts["han"] += int(is_han.sum())
        counts["han_tokens"] += int(is_han[starts[~blank[ids]]].sum())
        counts["byte_tokens"] += int(partial[ids].sum())
        counts["tokens"] += len(encoding)
        counts["characters"] += len(text)
        failed = encoder.backend.decode(encoding.ids, skip_special_tokens=False) != text
        counts["round_trip_failures"] += failed
    names = ("characters", "han", "tokens", "han_tokens", "byte_tokens", "round_trip_failures")
    return Density(len(texts), **{name: counts[name] for name in names})


def find_dead(encoder: Encoder, first_id: int = 0) -> dict[str, list[str]]:
    """Return the tokens from ``first_id`` on that encoding their own text does not produce.

    A piece formed inside a longer text is formed alone as well (its merges see nothing outside
    it), so one test each is enough. A line end before it takes SentencePiece's dummy prefix away.

    Returns:
        By encoder: ``fast`` (tokenizers) and, where there is a model, ``slow`` (SentencePiece).
    """
    lead = "\n" if encoder.slow is not None else ""
    num_lead = len(encoder.backend.encode(lead, add_special_tokens=False))
    spelt = [(i, encoder.spelling(i)) for i in range(first_id, encoder.num_ids)]
    ids = [index for index, text in spelt if text]
    texts = [text for _, text in spelt if text]
    found = {"fast": [encoding.ids for encoding in encoder.encode([lead + t for t in texts])]}
    if encoder.slow is not None:
        found["slow"] = encoder.slow.encode([lead + text for text in texts])
    return {
        name: [t for t, i, got in zip(texts, ids, rows, strict=True) if got[num_lead:] != [i]]
        for name, rows in found.items()
    }


def find_drift(
    before: Encoder, after: Encoder, texts: Sequence[str], scripts: tuple[str, ...]
) -> dict[str, Any]:
    """Compare the encodings of all lines that hold no character of ``scripts``."""
    pattern = run_pattern(scripts)
    lines = dict.fromkeys(x for t in texts for x in t.split("\n") if x and not pattern.search(x))
    changed = []
    for line, old, new in zip(lines, before.encode([*lines]), after.encode([*lines]), strict=True):
        slow_changed = (
            before.slow is not None
            and after.slow is not None
            and before.slow.encode(line) != after.slow.encode(line)
        )
        if old.ids != new.ids or slow_changed:
            changed.append(_difference(line, (before, old.ids), (after, new.ids)))
    return {"lines": len(lines), "changed": len(changed), "examples": changed[:NUM_EXAMPLES]}


def find_disparity(encoder: Encoder, texts: Sequence[str]) -> dict[str, Any] | None:
    """Compare SentencePiece's encoding with that of ``tokenizers``; None without SentencePiece."""
    if encoder.slow is None:
        return None
    different = 0
    examples: list[dict[str, Any]] = []
    for text, encoding in zip(texts, encoder.encode(texts), strict=True):
        slow_ids = encoder.slow.encode(text)
        if slow_ids != encoding.ids:
            different += 1
            if len(examples) < NUM_EXAMPLES:
                examples.append(_difference(text, (encoder, slow_ids), (encoder, encoding.ids)))
    return {"documents": len(texts), "different": different, "examples": examples}


def count_spelt_in_bytes(encoder: Encoder, texts: Sequence[str], limit: int) -> list[list[Any]]:
    """Return the most frequent characters that have no token of their own, with their counts."""
    counts = Counter(c for text in texts for c in text)
    counts = Counter({c: n for c, n in counts.items() if unicodedata.category(c)[0] not in "ZC"})
    lead = "\n" if encoder.slow is not None else ""
    num_lead = len(encoder.backend.encode(lead, add_special_tokens=False))
    encodings = encoder.encode([lead + c for c in counts])
    missing = [
        [character, number]
        for (character, number), encoding in zip(counts.items(), encodings, strict=True)
        if len(encoding) > num_lead + 1
    ]
    return sorted(missing, key=_most_frequent)[:limit]


def _most_frequent(entry: list[Any]) -> tuple[int, str]:
    return -entry[1], entry[0]


def _difference(
    text: str, one: tuple[Encoder, list[int]], other: tuple[Encoder, list[int]]
) -> dict[str, Any]:
    """Show the tokens around the first place where two encodings of a text part."""
    pairs = zip(one[1], other[1], strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one[1]), len(other[1])))
    window = slice(max(0, first - 2), first + CONTEXT_TOKENS)
    shown = [encoder.show(ids[window]) for encoder, ids in (one, other)]
    return {"text": text[:NUM_TEXT_CHARS], "before": shown[0], "after": shown[1]}
