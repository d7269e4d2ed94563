"""Load, save and identify a tokenizer; read what a model folder says of its size."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from tokenizer.hub import how_to_fetch
from tokenizer.spm import build_fast_tokenizer
from trainer.errors import ConfigError, DataError

MANIFEST_NAME = "kuroshio.json"
SENTENCEPIECE_NAME = "tokenizer.model"
JSON_NAME = "tokenizer.json"
# Last parts of the name of the input matrix in Hugging Face models of every family.
INPUT_MATRIX_SUFFIXES = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
)
ENCODING_KEYS = (
    "added_tokens",
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
    "model",
)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer folder or a bare SentencePiece ``.model`` file, without network.

    ``tokenizer.json`` is taken as it stands (no model-specific class rebuilds it); a SentencePiece
    model is converted so that ids equal SentencePiece's own.

    Raises:
        ConfigError: nothing there that is a tokenizer.
        DataError: a file that cannot be read as one.
    """
    path = Path(path)
    model_file = sentencepiece_file(path)
    if path.is_dir() and (path / JSON_NAME).is_file():
        try:
            return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
        except Exception as error:  # the Rust side raises plain Exception
            raise DataError(f"{path / JSON_NAME} cannot be read as a tokenizer: {error}") from error
    if model_file is None:
        raise ConfigError(
            f"tokenizer path {path}: no {JSON_NAME} or {SENTENCEPIECE_NAME} there and not a .model "
            f"file; give a tokenizer folder or a SentencePiece model{how_to_fetch(path)}"
        )
    tokenizer = build_fast_tokenizer(model_file.read_bytes(), str(model_file))
    if path.is_dir():
        tokenizer.add_special_tokens(_special_tokens(path, tokenizer))
        tokenizer.chat_template = _chat_template(path)
    return tokenizer


def sentencepiece_file(path: str | Path) -> Path | None:
    """Return the SentencePiece model at ``path`` (itself, or inside a folder), or None."""
    path = Path(path)
    inside = path / SENTENCEPIECE_NAME if path.is_dir() else path
    return inside if inside.is_file() and inside.suffix != ".json" else None


def fingerprint(path: str | Path) -> str:
    """Return the SHA-256 of what defines the encoding of the tokenizer at ``path``.

    For a folder with ``tokenizer.json``: its parts that decide ids, as canonical JSON, and the
    start and end tokens; so saving the same tokenizer again changes nothing. For SentencePiece:
    the bytes of the model, with the special tokens a folder's JSON files name.

    Raises:
        ConfigError: nothing there that is a tokenizer.
    """
    path = Path(path)
    digest = hashlib.sha256()
    json_file, model_file = path / JSON_NAME, sentencepiece_file(path)
    if path.is_dir() and json_file.is_file():
        whole = read_json(json_file)
        named = read_json(path / "tokenizer_config.json")
        ends = {key: _content(named.get(key)) for key in ("bos_token", "eos_token")}
        parts = {key: whole.get(key) for key in ENCODING_KEYS}
        digest.update(json.dumps([parts, ends], sort_keys=True).encode())
    elif model_file is not None:
        digest.update(model_file.read_bytes())
    else:
        raise ConfigError(
            f"tokenizer path {path}: no {JSON_NAME} and no SentencePiece model there; give a "
            f"tokenizer folder or a SentencePiece model{how_to_fetch(path)}"
        )
    return digest.hexdigest()


def save_tokenizer(
    tokenizer: PreTrainedTokenizerFast | bytes,
    out_folder: str | Path,
    model_bytes: bytes | None = None,
) -> PreTrainedTokenizerFast:
    """Write a folder that plain ``AutoTokenizer.from_pretrained`` loads offline.

    Args:
        tokenizer: a loaded tokenizer, or the bytes of a SentencePiece model to convert.
        out_folder: created when missing.
        model_bytes: SentencePiece bytes to keep beside it as ``tokenizer.model``.

    Returns:
        The tokenizer that was saved.
    """
    out_folder = Path(out_folder)
    out_folder.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, bytes):
        model_bytes = tokenizer
        tokenizer = build_fast_tokenizer(tokenizer, "the SentencePiece model to save")
    tokenizer.save_pretrained(out_folder)
    _name_portable_class(out_folder / "tokenizer_config.json")
    if model_bytes is not None:
        (out_folder / SENTENCEPIECE_NAME).write_bytes(model_bytes)
    return tokenizer


def _name_portable_class(config_file: Path) -> None:
    """Name the class that transformers 4 and 5 both know; 5 alone knows ``TokenizersBackend``."""
    config = read_json(config_file)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        text = json.dumps(config, indent=2, ensure_ascii=False)
        config_file.write_text(text + "\n", encoding="utf-8")


def vocab_size(path: str | Path) -> int:
    """Return the number of ids (largest id + 1) of the tokenizer at ``path``."""
    return num_ids(load_tokenizer(path))


def num_ids(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the largest id + 1 (``len`` is smaller where ids have gaps)."""
    return max(tokenizer.get_vocab().values()) + 1


def embedding_rows(model_folder: str | Path) -> int:
    """Read the rows of the input matrix from safetensors headers, else from ``config.json``.

    Raises:
        ConfigError: neither is there.
    """
    model_folder = Path(model_folder)
    for shard in sorted(model_folder.glob("*.safetensors")):
        for name, entry in safetensors_header(shard).items():
            if name.endswith(INPUT_MATRIX_SUFFIXES):
                return int(entry["shape"][0])
    size = read_json(model_folder / "config.json").get("vocab_size")
    if size is None:
        raise ConfigError(
            f"model.path={model_folder}: no safetensors file with an input embedding and no "
            "vocab_size in config.json; give a Hugging Face model folder"
        )
    return int(size)


def safetensors_header(path: Path) -> dict[str, Any]:
    """Read the JSON header of a safetensors file (8-byte little-endian length, then JSON).

    Raises:
        DataError: truncated or not a safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError(f"its header would have {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
        except (struct.error, ValueError, RecursionError) as error:
            raise DataError(f"{path} is not a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise DataError(f"{path} is not a safetensors file: its header is no JSON object")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if not _describes_tensor(entry, size - 8 - length):
            raise DataError(f"{path} is damaged: its header describes no tensor under {name!r}")
    return header


def _describes_tensor(entry: Any, num_bytes: int) -> bool:
    """Return whether an entry of a safetensors header has type, shape and a place in the data."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, place = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(place, list) or len(place) != 2:
        return False
    if not all(type(number) is int and number >= 0 for number in [*shape, *place]):
        return False
    return place[0] <= place[1] <= num_bytes


def template_sha256(path: str | Path) -> str | None:
    """Return the SHA-256 of a folder's chat template; None where it has none."""
    template = _chat_template(Path(path))
    return None if template is None else hashlib.sha256(template.encode()).hexdigest()


def _special_tokens(folder: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Return bos, eos, unk and pad that a folder's JSON files name and the vocabulary holds."""
    named = {
        **read_json(folder / "special_tokens_map.json"),
        **{k: v for k, v in read_json(folder / "tokenizer_config.json").items() if v},
    }
    vocab = tokenizer.get_vocab()
    keys = ("bos_token", "eos_token", "unk_token", "pad_token")
    contents = {key: _content(named.get(key)) for key in keys}
    return {key: text for key, text in contents.items() if text is not None and text in vocab}


def _chat_template(folder: Path) -> str | None:
    """Return the chat template of a folder: its own file, else an entry of its configuration."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    named = read_json(folder / "tokenizer_config.json").get("chat_template")
    return named if isinstance(named, str) else None


def _content(token: Any) -> str | None:
    """Return the text of a token that JSON gives as a string or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, or an empty one when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value
