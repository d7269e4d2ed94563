"""Give a model folder the rows of a new vocabulary, tensor by tensor, without loading the model.

Only the two vocabulary matrices (one when tied) are rewritten; every other byte is copied. Memory
is that of a few thousand rows, whatever the size of the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenizer.load import (
    INPUT_MATRIX_SUFFIXES,
    load_tokenizer,
    safetensors_header,
    save_tokenizer,
)
from tokenizer.pair import write_pair_manifest
from trainer.errors import ConfigError
from trainer.models.aside import written_aside
from trainer.models.identity import model_identity
from trainer.models.new_rows import Init, Vocabulary, iterate_new_rows, relate_vocabularies
from trainer.models.shards import Progress, rewrite_shard

# Last parts of the name of the output matrix (and bias) in Hugging Face models of every family.
OUTPUT_MATRIX_SUFFIXES = ("lm_head.weight", "embed_out.weight")
OUTPUT_BIAS_SUFFIXES = ("lm_head.bias", "embed_out.bias")
OUTPUT_SUFFIXES = OUTPUT_MATRIX_SUFFIXES + OUTPUT_BIAS_SUFFIXES
INDEX_NAME = "model.safetensors.index.json"
# Weights in other formats would be stale, tokenizer files belong to the old vocabulary.
LEFT_OUT = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "kuroshio.json",
)


@dataclass(frozen=True)
class Resize:
    """What a resize did; goes into the manifest of the pair."""

    old_rows: int
    embedding_rows: int
    real_rows: int  # ids of the tokenizer; rows from here on are padding
    kept_rows: int  # rows copied from the base
    init: str
    seed: int
    tied: bool
    matrices: list[str]


def resize_model(
    model_folder: str | Path,
    base_tokenizer: str | Path,
    new_tokenizer: str | Path,
    out_folder: str | Path,
    init: Init = "subpiece_mean",
    pad_to_multiple: int = 64,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> Resize:
    """Write the model of ``model_folder`` with the rows of ``new_tokenizer`` into ``out_folder``.

    Args:
        model_folder: a Hugging Face folder with safetensors, in one file or sharded.
        base_tokenizer: the tokenizer the model was trained with.
        new_tokenizer: its extension; the ids of the base keep their meaning.
        out_folder: must not exist; it appears when everything is written, with the new tokenizer
            and the manifest that ties the two.
        init: of the new rows, see ``new_rows.iterate_new_rows``.
        pad_to_multiple: rows are padded to a multiple of this.
        seed: of ``init=normal``; the output matrix of an untied model draws with ``seed + 1``.
        progress: called with the number of bytes written.

    Raises:
        ConfigError: no safetensors, tokenizers that do not extend each other, or too few rows.
        StorageError: disk full or folder not writable; nothing is left behind.
    """
    model_folder, out_folder = Path(model_folder), Path(out_folder)
    headers = _read_headers(model_folder)
    vocabulary = relate_vocabularies(load_tokenizer(base_tokenizer), load_tokenizer(new_tokenizer))
    names = _vocabulary_tensors(headers)
    old_rows = _old_rows(headers, names, vocabulary, model_folder)
    num_rows = max(old_rows, -(-vocabulary.num_ids // pad_to_multiple) * pad_to_multiple)
    config = _resized_config(model_folder, old_rows, num_rows)
    stored_output = any(name.endswith(OUTPUT_MATRIX_SUFFIXES) for name in names)
    tied = bool(config.get("tie_word_embeddings")) or not stored_output

    def new_values(name: str, tensor: Tensor) -> Iterator[Tensor]:
        matrix = tensor if tensor.dim() == 2 else tensor.unsqueeze(1)  # a bias has rows of one
        own_seed = seed + (name.endswith(OUTPUT_SUFFIXES) and not tied)
        own_init: Init = "mean" if tensor.dim() == 1 and init == "normal" else init
        yield matrix[: vocabulary.num_base]
        yield from iterate_new_rows(matrix, vocabulary, num_rows, own_init, own_seed)

    with written_aside(out_folder) as folder:
        _copy_other_files(model_folder, folder)
        grown = 0
        for shard, header in headers.items():
            paths = model_folder / shard, folder / shard
            grown += rewrite_shard(*paths, header, set(names), num_rows, new_values, progress)
        _write_json(folder / "config.json", config)
        _write_index(model_folder, folder, grown)
        _place_tokenizer(Path(new_tokenizer), folder)
        result = Resize(
            old_rows, num_rows, vocabulary.num_ids, vocabulary.num_base, init, seed, tied, names
        )
        more = {"model_identity": model_identity(folder), "resize": asdict(result)}
        write_pair_manifest(folder, folder, more)
    return result


def model_bytes(model_folder: str | Path) -> int:
    """Return the bytes of the model's safetensors files."""
    folder = Path(model_folder)
    return sum((folder / name).stat().st_size for name in shard_names(folder))


def shard_names(model_folder: Path) -> list[str]:
    """Return the safetensors files that make up the model (copies in other layouts are not).

    Raises:
        ConfigError: there are none.
    """
    if (model_folder / INDEX_NAME).is_file():
        index = json.loads((model_folder / INDEX_NAME).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
    else:
        names = [path.name for path in model_folder.glob("model.safetensors")]
    missing = [name for name in names if not (model_folder / name).is_file()]
    if missing or not names:
        raise ConfigError(
            f"model.path={model_folder} lacks {', '.join(missing) or 'model.safetensors'}; give a "
            "complete Hugging Face model folder (convert a pytorch_model.bin with save_pretrained)"
        )
    return names


def _read_headers(model_folder: Path) -> dict[str, dict[str, Any]]:
    """Return the tensors of each shard, by file name."""
    return {name: safetensors_header(model_folder / name) for name in shard_names(model_folder)}


def _vocabulary_tensors(headers: dict[str, dict[str, Any]]) -> list[str]:
    ends = INPUT_MATRIX_SUFFIXES + OUTPUT_SUFFIXES
    return sorted(name for header in headers.values() for name in header if name.endswith(ends))


def _old_rows(
    headers: dict[str, dict[str, Any]],
    names: list[str],
    vocabulary: Vocabulary,
    model_folder: Path,
) -> int:
    """Return the common number of rows of the vocabulary tensors."""
    tensors = {name: entry for header in headers.values() for name, entry in header.items()}
    rows = {tensors[name]["shape"][0] for name in names}
    if len(rows) != 1 or not any(name.endswith(INPUT_MATRIX_SUFFIXES) for name in names):
        raise ConfigError(
            f"model.path={model_folder}: expected an input matrix named "
            f"*{' or *'.join(INPUT_MATRIX_SUFFIXES)} and as many rows in the output matrix; found "
            + (", ".join(f"{name} {tensors[name]['shape']}" for name in names) or "none")
        )
    if (count := rows.pop()) < vocabulary.num_base:
        raise ConfigError(
            f"stage.base_tokenizer has {vocabulary.num_base} ids, but model.path={model_folder} "
            f"has {count} embedding rows; give the tokenizer the model was trained with"
        )
    return int(count)


def _resized_config(model_folder: Path, old_rows: int, num_rows: int) -> dict[str, Any]:
    """Return ``config.json`` with the new number of rows, also where it is nested."""
    config: dict[str, Any] = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    for section in (config, config.get("text_config")):
        if isinstance(section, dict) and section.get("vocab_size") == old_rows:
            section["vocab_size"] = num_rows
    return config


def _place_tokenizer(new_tokenizer: Path, folder: Path) -> None:
    """Put the new tokenizer into the model folder."""
    if new_tokenizer.is_file():
        save_tokenizer(new_tokenizer.read_bytes(), folder)
        return
    for path in sorted(new_tokenizer.iterdir()):
        if path.name in TOKENIZER_FILES or path.suffix == ".jinja":
            shutil.copyfile(path, folder / path.name)


def _copy_other_files(model_folder: Path, folder: Path) -> None:
    for path in sorted(model_folder.iterdir()):
        if path.is_file() and path.suffix not in LEFT_OUT and path.name not in TOKENIZER_FILES:
            shutil.copyfile(path, folder / path.name)


def _write_index(model_folder: Path, folder: Path, grown: int) -> None:
    """Correct the total size in the index of a sharded model."""
    if not (model_folder / INDEX_NAME).is_file():
        return
    index = json.loads((model_folder / INDEX_NAME).read_text(encoding="utf-8"))
    if "total_size" in index.get("metadata", {}):
        index["metadata"]["total_size"] += grown
    _write_json(folder / INDEX_NAME, index)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
