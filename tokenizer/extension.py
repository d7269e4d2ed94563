"""Extend any base tokenizer, SentencePiece or byte-level, and write the result."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import AddedToken, Tokenizer

from tokenizer.extend_bpe import extend_byte_level
from tokenizer.load import JSON_NAME, load_tokenizer, save_tokenizer, sentencepiece_file
from tokenizer.measure import Encoder
from tokenizer.merge import merge_clean, merge_compatible
from tokenizer.scripts import DEFAULT_SCRIPTS
from tokenizer.spm import NORMAL, USER_DEFINED, parse_model
from trainer.errors import ConfigError


@dataclass(frozen=True)
class Rules:
    """How pieces are merged into a base; see ``tokenizer.merge``."""

    merge: Literal["clean", "compatible"] = "clean"
    scripts: Sequence[str] = DEFAULT_SCRIPTS
    dead_pieces: Literal["drop", "revive"] = "drop"
    extra_pieces: Sequence[str] = ()


@dataclass(frozen=True)
class Extended:
    """An extended tokenizer, not yet written."""

    base: Path
    model_bytes: bytes | None  # SentencePiece bases
    tokenizer_json: str | None  # byte-level bases
    added: Sequence[str]
    intermediates: Sequence[str]
    dropped: Mapping[str, Sequence[str]]
    extra_pieces: Sequence[str]

    def encoder(self) -> Encoder:
        """Return it ready to encode."""
        if self.model_bytes is not None:
            return Encoder.of_model(self.model_bytes)
        backend = Tokenizer.from_str(self.tokenizer_json or "")
        backend.add_tokens([AddedToken(text, special=True) for text in self.extra_pieces])
        return Encoder(backend, None, max(backend.get_vocab().values()) + 1)

    def save(self, folder: Path) -> None:
        """Write it as a folder that ``AutoTokenizer`` loads, with the base's chat template."""
        if self.model_bytes is not None:
            save_tokenizer(self.model_bytes, folder)
            return
        for path in sorted(self.base.iterdir()):
            if path.name == "tokenizer_config.json" or path.suffix == ".jinja":
                shutil.copyfile(path, folder / path.name)
        (folder / JSON_NAME).write_text(self.tokenizer_json or "", encoding="utf-8")
        if self.extra_pieces:
            tokenizer = load_tokenizer(folder)
            tokenizer.add_tokens([AddedToken(text, special=True) for text in self.extra_pieces])
            save_tokenizer(tokenizer, folder)


def extend_tokenizer(base: Path, pieces: bytes, rules: Rules) -> Extended:
    """Extend the tokenizer at ``base`` with the pieces of a SentencePiece model.

    Args:
        base: a SentencePiece ``.model``, a folder that holds ``tokenizer.model``, or a folder with
            the ``tokenizer.json`` of a byte-level BPE.
        pieces: bytes of the donor model.
        rules: how to merge.

    Raises:
        ConfigError: ``merge=compatible`` with a byte-level base.
        DataError: base or donor cannot be used.
    """
    model_file = sentencepiece_file(base)
    if model_file is not None:
        base_bytes = model_file.read_bytes()
        if rules.merge == "compatible":
            done = merge_compatible(base_bytes, pieces, rules.extra_pieces)
        else:
            done = merge_clean(
                base_bytes, pieces, rules.scripts, rules.dead_pieces, rules.extra_pieces
            )
        return Extended(
            base, done.model_bytes, None, done.added, done.intermediates, done.dropped, ()
        )
    if rules.merge == "compatible":
        raise ConfigError(
            f"stage.merge=compatible, but stage.base_tokenizer={base} is no SentencePiece model; "
            "use merge=clean for a tokenizer.json"
        )
    if not (base / JSON_NAME).is_file():
        raise ConfigError(
            f"stage.base_tokenizer={base}: no {JSON_NAME} and no SentencePiece model there"
        )
    grown = extend_byte_level(
        (base / JSON_NAME).read_text(encoding="utf-8"),
        piece_texts(pieces),
        rules.scripts,
        rules.dead_pieces,
    )
    return Extended(
        base,
        None,
        grown.tokenizer_json,
        grown.added,
        grown.intermediates,
        grown.dropped,
        rules.extra_pieces,
    )


def piece_texts(pieces: bytes) -> list[str]:
    """Return the ordinary pieces of a SentencePiece model, best score first."""
    model = parse_model(pieces, "stage.pieces")
    ordinary = [piece for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED)]
    return [piece.piece for piece in sorted(ordinary, key=lambda piece: -piece.score)]
