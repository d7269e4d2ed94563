"""Extend a byte-level BPE tokenizer (``tokenizer.json`` of the Llama-3 or Qwen kind).

There is no SentencePiece file to append to: a new token needs the merges that reach it from bytes.
They are appended to the list, so they come after every merge of the base, and each result begins
with a whole character of the wanted scripts or with bytes that only those scripts use. Text
without those scripts therefore keeps its encoding.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

from tokenizers import Tokenizer

from tokenizer.scripts import DEFAULT_SCRIPTS, run_pattern
from trainer.errors import DataError


@dataclass(frozen=True)
class Extension:
    """An extended ``tokenizer.json`` and what became of the pieces."""

    tokenizer_json: str
    added: list[str]  # pieces that are tokens now, as text, in order of id
    intermediates: list[str]  # byte-level spelling of tokens that only lead to others
    dropped: dict[str, list[str]] = field(default_factory=dict)  # reason → pieces left out


@lru_cache(maxsize=1)
def byte_alphabet() -> tuple[str, ...]:
    """Return the character that stands for each byte (GPT-2's rule).

    Printable Latin-1 characters stand for themselves, the others for U+0100 and on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


def spell_bytes(text: str) -> str:
    """Return the byte-level spelling of a text, as the vocabulary has it."""
    alphabet = byte_alphabet()
    return "".join(alphabet[byte] for byte in text.encode())


def read_spelling(token: str) -> bytes:
    """Return the bytes a byte-level token stands for."""
    values = {character: byte for byte, character in enumerate(byte_alphabet())}
    return bytes(values[character] for character in token)


def is_byte_level(tokenizer_json: dict[str, Any]) -> bool:
    """Say whether a parsed ``tokenizer.json`` is byte-level BPE."""
    steps = json.dumps([tokenizer_json.get("pre_tokenizer"), tokenizer_json.get("decoder")])
    return tokenizer_json.get("model", {}).get("type") == "BPE" and '"ByteLevel"' in steps


def extend_byte_level(
    tokenizer_json: str,
    pieces: Sequence[str],
    scripts: Sequence[str] = DEFAULT_SCRIPTS,
    dead_pieces: Literal["drop", "revive"] = "drop",
) -> Extension:
    """Add pieces, and the merges that reach them, to a byte-level BPE tokenizer.

    Args:
        tokenizer_json: content of the base's ``tokenizer.json``.
        pieces: texts, the most useful first; shorter ones are added first, so that longer ones
            are built from them.
        scripts: classes of ``tokenizer.scripts``; pieces of others are left out.
        dead_pieces: ``drop`` words that need an intermediate token besides the pieces, or
            ``revive`` them with it. Single characters always get the tokens they need.

    Raises:
        DataError: the base is not byte-level BPE, or nothing is left to add.
    """
    whole = json.loads(tokenizer_json)
    if not is_byte_level(whole):
        raise DataError(
            "stage.base_tokenizer: this tokenizer.json is not byte-level BPE; for a SentencePiece "
            "tokenizer give its tokenizer.model (or a folder that holds it)"
        )
    base = Tokenizer.from_str(tokenizer_json)
    vocab, merges = whole["model"]["vocab"], whole["model"]["merges"]
    wanted, dropped = _select(base, vocab, pieces, tuple(scripts))
    grower = _Grower(vocab, [_pair(merge) for merge in merges], tuple(scripts))
    added: list[str] = []
    for text in sorted(wanted, key=len):
        reason = grower.add(text, revive=dead_pieces == "revive")
        (added if reason is None else dropped.setdefault(reason, [])).append(text)
    if not added:
        raise DataError(
            f"the {len(pieces)} pieces hold nothing to add in scripts {', '.join(scripts)}; "
            "choose other stage.scripts or another stage.pieces"
        )
    _write_into(whole, grower)
    spellings = {spell_bytes(text) for text in added}
    intermediates = [token for token in grower.new_tokens if token not in spellings]
    return Extension(json.dumps(whole, ensure_ascii=False), added, intermediates, dropped)


class _Grower:
    """Grow a merge list token by token."""

    def __init__(
        self, vocab: dict[str, int], merges: list[tuple[str, str]], scripts: tuple[str, ...]
    ) -> None:
        self.known = set(vocab)
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.scripts = scripts
        self.new_tokens: list[str] = []
        self.new_merges: list[tuple[str, str]] = []

    def add(self, text: str, revive: bool) -> str | None:
        """Make ``text`` reachable; return the reason when it is left out."""
        spelling, steps = spell_bytes(text), []
        # After each new merge the piece is split again: the merge may apply in several places.
        while len(parts := self.segment(spelling)) > 1:
            steps.append((parts[0], parts[1]))
            self.ranks[steps[-1]] = len(self.ranks)
        made = [left + right for left, right in steps]
        reason = self._objection(text, made, revive)
        if reason:
            for pair in steps:
                del self.ranks[pair]
            return reason
        self.new_merges += steps
        for token in made:
            if token not in self.known:
                self.known.add(token)
                self.new_tokens.append(token)
        return None

    def _objection(self, text: str, made: list[str], revive: bool) -> str | None:
        """Return why a piece that needs these tokens must be left out, if it must."""
        between = [token for token in made if token != spell_bytes(text)]
        if len(text) > 1 and not revive and any(token not in self.known for token in between):
            return "dead"
        if not all(_only_in_scripts(read_spelling(token), self.scripts) for token in between):
            return "bytes shared with other scripts"
        return None

    def segment(self, spelling: str) -> list[str]:
        """Split a spelling by the merges so far (lowest rank first, leftmost first)."""
        parts = list(spelling)
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            where = pairs.index(best)
            parts[where : where + 2] = [best[0] + best[1]]
        return parts


@lru_cache(maxsize=100_000)
def _only_in_scripts(data: bytes, scripts: tuple[str, ...]) -> bool:
    """Say whether text can contain these bytes, from a character's start, only in ``scripts``."""
    pattern = run_pattern(scripts)
    whole = data.decode(errors="ignore")
    if whole:
        return pattern.match(whole) is not None
    lead = data[0]
    length, bits = (4, lead & 0x07) if lead >= 0xF0 else (3, lead & 0x0F)
    if lead < 0xE0:
        length, bits = 2, lead & 0x1F
    for byte in data[1:]:
        bits = bits << 6 | byte & 0x3F
    missing = 6 * (length - len(data))
    candidates = map(chr, range(bits << missing, (bits + 1) << missing))
    return all(unicodedata.category(c) in ("Cn", "Cs") or pattern.match(c) for c in candidates)


def _select(
    base: Tokenizer, vocab: dict[str, int], pieces: Sequence[str], scripts: tuple[str, ...]
) -> tuple[list[str], dict[str, list[str]]]:
    """Return the pieces that can become tokens, and the others by reason."""
    pattern = run_pattern(scripts)
    wanted: list[str] = []
    dropped: dict[str, list[str]] = {}
    for text in dict.fromkeys(pieces):
        if spell_bytes(text) in vocab:
            dropped.setdefault("in the base", []).append(text)
        elif not pattern.fullmatch(text):
            dropped.setdefault("other scripts", []).append(text)
        elif base.normalizer is not None and base.normalizer.normalize_str(text) != text:
            dropped.setdefault("rewritten by the normaliser", []).append(text)
        elif len(base.pre_tokenizer.pre_tokenize_str(text)) > 1:
            dropped.setdefault("cut by the pre-tokenizer", []).append(text)
        else:
            wanted.append(text)
    return wanted, dropped


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """Return a merge of either spelling: ``"a b"`` or ``["a", "b"]``."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _write_into(whole: dict[str, Any], grower: _Grower) -> None:
    """Write new tokens after the last id in use, and the merges in the file's own spelling.

    Added tokens whose ids follow the vocabulary go into it: on loading, their ids are counted
    from the size of the vocabulary, which has grown.
    """
    vocab, merges = whole["model"]["vocab"], whole["model"]["merges"]
    vocab.update({token["content"]: token["id"] for token in whole.get("added_tokens", [])})
    first = max(vocab.values()) + 1
    vocab.update({token: first + place for place, token in enumerate(grower.new_tokens)})
    as_text = bool(merges) and isinstance(merges[0], str)
    merges.extend(" ".join(pair) if as_text else list(pair) for pair in grower.new_merges)
