"""The token store: memory-mapped arrays of one prepared source, and how they are checked.

A source's folder holds one ``.npy`` file per array and ``manifest.json``, which names their sizes
and hashes. The manifest is written last, so a folder that has one is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.disk import hash_file
from trainer.errors import DataError

MANIFEST = "manifest.json"
STORE_FORMAT = "kuroshio-store-1"
# One entry a document: tokens with start and end token, Unicode characters, UTF-8 bytes, and the
# first 8 bytes of BLAKE2b over the text, which decide whether the document is held out.
DOCUMENT_ARRAYS: dict[str, np.dtype[Any]] = {
    "num_tokens": np.dtype("<u4"),
    "num_chars": np.dtype("<u4"),
    "num_bytes": np.dtype("<u4"),
    "text_hashes": np.dtype("<u8"),
}
# What a source has besides, by ``data.content``: one entry a token or a document; ``answers``
# (texts) and ``chats`` (JSON) are UTF-8 bytes, one document's after the other's.
CONTENT_ARRAYS: dict[str, dict[str, np.dtype[Any]]] = {
    "documents": {},
    "conversations": {"weights": np.dtype("<f4")},
    "preferences": {
        "weights": np.dtype("<f4"),
        "first_lengths": np.dtype("<u4"),
        "margins": np.dtype("<f4"),
    },
    "prompts": {
        "answer_lengths": np.dtype("<u4"),
        "answers": np.dtype("u1"),
        "chat_lengths": np.dtype("<u4"),
        "chats": np.dtype("u1"),
    },
}


def hash_text(text_bytes: bytes) -> int:
    """Return the 64-bit hash of a text that decides on which side of the split it falls."""
    return int.from_bytes(hashlib.blake2b(text_bytes, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class SourceStore:
    """One prepared source. Arrays are memory-mapped and read-only.

    Attributes:
        name: the source's name in the configuration.
        folder: where the arrays are.
        tokens: ``[num_tokens]`` ids of all documents, one after the other.
        offsets: ``[num_documents + 1]`` where each document starts in ``tokens``.
        num_chars: ``[num_documents]``.
        num_bytes: ``[num_documents]`` UTF-8 bytes.
        text_hashes: ``[num_documents]`` uint64.
        holdout_share: share of documents kept from training.
        manifest: what ``kuroshio prepare`` recorded.
        weights: ``[num_tokens]`` of conversations: factor of each token's loss as a target, 0 for
            none; documents have no such array.
        first_lengths: ``[num_documents]`` of preferences: tokens of the chosen sequence, after
            which the rejected one begins; either may be empty. Others have no such array.
        margins: ``[num_documents]`` of preferences: by how much the chosen answer is better, 0
            where nobody said. Others have no such array.
        answers: UTF-8 bytes of the answers that the files give to prompts; others have none.
        answer_offsets: ``[num_documents + 1]`` where each prompt's answer starts in ``answers``.
        chats: JSON of what the chat template made each prompt of; others have none.
        chat_offsets: ``[num_documents + 1]`` where each prompt's starts in ``chats``.
    """

    name: str
    folder: Path
    tokens: NDArray[Any]
    offsets: NDArray[np.int64]
    num_chars: NDArray[np.uint32]
    num_bytes: NDArray[np.uint32]
    text_hashes: NDArray[np.uint64]
    holdout_share: float
    manifest: Mapping[str, Any]
    weights: NDArray[np.float32] | None = None
    first_lengths: NDArray[np.uint32] | None = None
    margins: NDArray[np.float32] | None = None
    answers: NDArray[np.uint8] | None = None
    answer_offsets: NDArray[np.int64] | None = None
    chats: NDArray[np.uint8] | None = None
    chat_offsets: NDArray[np.int64] | None = None

    @classmethod
    def open(cls, folder: Path, name: str, holdout_share: float) -> SourceStore:
        """Map the arrays of a committed source folder.

        Raises:
            DataError: no manifest, another format, or files of another size than recorded.
        """
        manifest = read_manifest(folder)
        mapped = {array: _map_array(folder, array, manifest) for array in manifest["arrays"]}
        answer_lengths, chat_lengths = mapped.get("answer_lengths"), mapped.get("chat_lengths")
        return cls(
            name=name,
            folder=folder,
            tokens=mapped["tokens"],
            offsets=_offsets(mapped["num_tokens"]),
            num_chars=mapped["num_chars"],
            num_bytes=mapped["num_bytes"],
            text_hashes=mapped["text_hashes"],
            holdout_share=holdout_share,
            manifest=manifest,
            weights=mapped.get("weights"),
            first_lengths=mapped.get("first_lengths"),
            margins=mapped.get("margins"),
            answers=mapped.get("answers"),
            answer_offsets=None if answer_lengths is None else _offsets(answer_lengths),
            chats=mapped.get("chats"),
            chat_offsets=None if chat_lengths is None else _offsets(chat_lengths),
        )

    @property
    def content(self) -> str:
        """What it was prepared as, of ``data.content``: told by its arrays."""
        present = set(self.manifest["arrays"])
        return next(c for c, names in reversed(CONTENT_ARRAYS.items()) if set(names) <= present)

    def document_ids(self, held_out: bool) -> NDArray[np.int64]:
        """Return the indices of the held-out documents, or of the others. -> [n]

        The choice hangs on each document's text alone: equal texts fall on the same side, and
        adding files moves no document.
        """
        if self.holdout_share >= 1.0:
            chosen = np.ones(len(self.text_hashes), bool)
        else:
            chosen = self.text_hashes < np.uint64(self.holdout_share * 2.0**64)
        return np.flatnonzero(chosen if held_out else ~chosen)

    def document(self, index: int) -> NDArray[Any]:
        """Return the ids of one document, without copying. -> [tokens of the document]"""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def document_weights(self, index: int) -> NDArray[np.float32] | None:
        """Return the loss weights of one document's tokens. -> [tokens of the document]"""
        if self.weights is None:
            return None
        return self.weights[self.offsets[index] : self.offsets[index + 1]]

    def answer(self, index: int) -> str | None:
        """Return the answer that the file gives to one prompt (``data.content=prompts``).

        It is what rule rewards compare a response with: the answer of a conversation or a row, the
        better answer of a pair, the best of a ranked list. None where the file gives none, and for
        other content.
        """
        if self.answers is None or self.answer_offsets is None:
            return None
        text = self.answers[self.answer_offsets[index] : self.answer_offsets[index + 1]]
        return text.tobytes().decode() or None

    def chat(self, index: int) -> dict[str, Any] | None:
        """Return what the chat template made one prompt of (``data.content=prompts``).

        It has ``messages`` and ``tools`` as ``apply_chat_template`` reads them, a system message of
        ``data.system`` among them: another model's template renders the same prompt from it. None
        for other content.
        """
        if self.chats is None or self.chat_offsets is None:
            return None
        text = self.chats[self.chat_offsets[index] : self.chat_offsets[index + 1]]
        chat: dict[str, Any] = json.loads(text.tobytes())
        return chat


def _offsets(lengths: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return where each entry starts, and where the last ends. lengths [n] -> [n + 1]."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


@dataclass(frozen=True)
class TokenStore:
    """All sources of a run, in the configuration's order, and the tokenizer's special ids."""

    sources: dict[str, SourceStore]
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int  # the tokenizer's, else its end token, else 0: never a label


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of a source folder.

    Raises:
        DataError: it is missing, damaged or of another format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"token store {folder} has no readable {MANIFEST}: {error}; delete the folder and run "
            "`kuroshio prepare` again"
        ) from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != STORE_FORMAT:
        raise DataError(
            f"token store {folder} has format {found!r}, expected {STORE_FORMAT}; "
            "run `kuroshio prepare` again with another data.store_dir"
        )
    arrays = manifest.get("arrays")
    known = {"tokens", *DOCUMENT_ARRAYS, *(n for names in CONTENT_ARRAYS.values() for n in names)}
    if (
        not isinstance(arrays, dict)
        or not {"tokens", *DOCUMENT_ARRAYS} <= arrays.keys() <= known
        or not all(isinstance(e, dict) and {"bytes", "sha256"} <= e.keys() for e in arrays.values())
    ):
        raise DataError(
            f"token store {folder}: {MANIFEST} does not describe its arrays; delete the folder and "
            "run `kuroshio prepare` again"
        )
    return manifest


def _map_array(folder: Path, array: str, manifest: Mapping[str, Any]) -> NDArray[Any]:
    path, expected = folder / f"{array}.npy", manifest["arrays"][array]["bytes"]
    found = path.stat().st_size if path.exists() else 0
    if found != expected:
        raise DataError(
            f"{path} has {found} bytes, its manifest says {expected}; delete {folder} and run "
            "`kuroshio prepare` again"
        )
    return np.load(path, mmap_mode="r")


def verify(folder: Path) -> None:
    """Hash every array of a source folder and compare with its manifest.

    Raises:
        DataError: naming the first file that differs.
    """
    for array, entry in read_manifest(folder)["arrays"].items():
        path = folder / f"{array}.npy"
        if not path.is_file():
            raise DataError(f"{path} is missing; delete {folder} and run `kuroshio prepare` again")
        found = hash_file(path)
        if found != entry["sha256"]:
            raise DataError(
                f"{path} is damaged: SHA-256 {found[:12]}…, its manifest says "
                f"{entry['sha256'][:12]}…; delete {folder} and run `kuroshio prepare` again"
            )
