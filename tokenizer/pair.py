"""A tokenizer and the model it belongs to: tied by a manifest, or told by sizes and ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from tokenizer.load import (
    JSON_NAME,
    MANIFEST_NAME,
    embedding_rows,
    fingerprint,
    load_tokenizer,
    num_ids,
    read_json,
    sentencepiece_file,
    template_sha256,
    vocab_size,
)
from trainer.errors import ConfigError


def write_pair_manifest(
    model_folder: str | Path, tokenizer_path: str | Path, more: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Tie a tokenizer to the model folder by writing ``kuroshio.json`` there.

    Args:
        model_folder: a Hugging Face model folder.
        tokenizer_path: its tokenizer (a folder or ``.model``).
        more: further entries (for instance which rows are real and how they were initialised).

    Returns:
        The manifest.
    """
    model_file = sentencepiece_file(tokenizer_path)
    manifest = {
        "format": "kuroshio-pair-1",
        "tokenizer_fingerprint": fingerprint(tokenizer_path),
        "template_sha256": template_sha256(tokenizer_path),
        "sentencepiece_sha256": fingerprint(model_file) if model_file else None,
        "vocab_size": vocab_size(tokenizer_path),
        "embedding_rows": embedding_rows(model_folder),
        **(more or {}),
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (Path(model_folder) / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")
    return manifest


def check_pair(model_folder: str | Path, tokenizer_path: str | Path) -> None:
    """Refuse a tokenizer that is not the model's.

    A model needs at least as many rows as the tokenizer has ids. With a manifest in the model
    folder the fingerprint must be the recorded one. Without, a tokenizer from elsewhere must give
    the model's start and end tokens, and the pieces of its own tokenizer if it has one, their ids.

    Raises:
        ConfigError: naming both sizes.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    ids, rows = num_ids(tokenizer), embedding_rows(model_folder)
    sizes = f"the tokenizer has {ids} ids, the model {rows} embedding rows"
    if rows < ids:
        raise ConfigError(
            f"tokenizer.path={tokenizer_path} does not fit model.path={model_folder}: {sizes}; "
            "resize the model with stage=vocab, or use the model's own tokenizer"
        )
    manifest = read_json(Path(model_folder) / MANIFEST_NAME)
    known = {manifest.get("tokenizer_fingerprint"), manifest.get("sentencepiece_sha256")} - {None}
    if known and fingerprint(tokenizer_path) not in known:
        raise ConfigError(
            f"tokenizer.path={tokenizer_path} is not the tokenizer of model.path={model_folder}: "
            f"{sizes}, made for {manifest.get('vocab_size')} ids of another tokenizer "
            f"(fingerprint {fingerprint(tokenizer_path)[:12]}, recorded "
            f"{str(manifest.get('tokenizer_fingerprint'))[:12]} in {MANIFEST_NAME}); "
            "use the tokenizer inside the model folder"
        )
    is_own = Path(tokenizer_path).resolve() == Path(model_folder).resolve()
    if problem := "" if known or is_own else _other_ids(Path(model_folder), tokenizer):
        raise ConfigError(
            f"tokenizer.path={tokenizer_path} is not the tokenizer of model.path={model_folder}: "
            f"{problem} ({sizes}); use the model's own tokenizer, or make its vocabulary the "
            "model's with stage=vocab"
        )


def _other_ids(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return which ids a tokenizer gives otherwise than a model was trained with, if any."""
    found = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if (folder / JSON_NAME).is_file() or sentencepiece_file(folder):
        own = load_tokenizer(folder)
        pieces, theirs = own.get_vocab(), tokenizer.get_vocab()
        moved = [piece for piece, i in pieces.items() if theirs.get(piece, i) != i]
        if moved:
            first = min(moved, key=pieces.__getitem__)
            return (
                f"{len(moved)} pieces have other ids than in the model's own, such as {first!r} "
                f"{theirs[first]} instead of {pieces[first]}"
            )
        known = {"bos_token_id": {own.bos_token_id}, "eos_token_id": {own.eos_token_id}}
    else:
        files = [read_json(folder / n) for n in ("config.json", "generation_config.json")]
        known = {key: {i for file in files for i in _ids(file.get(key))} for key in found}
    wrong = [
        f"{key}={given} instead of {' or '.join(map(str, sorted(known[key] - {None})))}"
        for key, given in found.items()
        if given is not None and known[key] - {None} and given not in known[key]
    ]
    return ", ".join(wrong)


def _ids(value: Any) -> list[int]:
    """Return the ids of an entry of a model's configuration: none, one or several."""
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int)]
