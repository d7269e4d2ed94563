"""Who a base model is: a hash of its weights, cheap enough to take at every start."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from tokenizer.load import safetensors_header
from trainer.errors import ConfigError

# Of every tensor this many blocks are read, evenly spread, first and last included: a model that
# was trained on, merged or rounded differs in practically every number of some tensor.
NUM_BLOCKS = 8
BLOCK_BYTES = 4096


def model_identity(folder: Path) -> str:
    """Return the SHA-256 of a model folder's tensor names, types, shapes and sampled values.

    It does not depend on how the tensors are spread over files. A 7B model takes about 2,300 reads
    of 4 KB; tensors up to 32 KB are read whole.

    Raises:
        ConfigError: there is no such folder, or it has no safetensors files.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"model.path={folder} is not there; bring the folder back, or put a link to where it is"
        )
    digests: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        digests.update(_tensor_digests(path))
    if not digests:
        raise ConfigError(
            f"model.path={folder} has no .safetensors file; convert the model with "
            "transformers' save_pretrained"
        )
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def refuse_other_base(folder: Path, inputs: Mapping[str, str]) -> None:
    """Refuse to put a run's weights into a base that it was not trained on.

    Args:
        folder: the model folder that frozen weights would come from.
        inputs: what a checkpoint of the run says it read (``trainer/inputs.py``).

    Raises:
        ConfigError: the folder's weights are others.
    """
    before = inputs.get("model.path")
    if before is not None and any(folder.glob("*.safetensors")):
        now = model_identity(folder)
        if now != before:
            raise ConfigError(
                f"model.path={folder} has changed since the run was trained on it (identity "
                f"{before[:12]} then, {now[:12]} now), and the weights that the run froze are read "
                "from there; bring the old ones back"
            )


def _tensor_digests(path: Path) -> dict[str, str]:
    """Return a digest of every tensor in a safetensors file."""
    header = safetensors_header(path)
    digests = {}
    with path.open("rb") as file:
        data_start = 8 + int.from_bytes(file.read(8), "little")
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            kind = f"{entry['dtype']} {entry['shape']}"
            digest = hashlib.sha256(kind.encode("utf-8", "backslashreplace"))
            for offset in _block_offsets(stop - start):
                file.seek(data_start + start + offset)
                digest.update(file.read(min(BLOCK_BYTES, stop - start - offset)))
            digests[name] = digest.hexdigest()
    return digests


def _block_offsets(num_bytes: int) -> list[int]:
    """Return where the sampled blocks of a tensor begin."""
    if num_bytes <= NUM_BLOCKS * BLOCK_BYTES:
        return list(range(0, num_bytes, BLOCK_BYTES))
    last = num_bytes - BLOCK_BYTES
    return [last * number // (NUM_BLOCKS - 1) for number in range(NUM_BLOCKS)]


def published_name(folder: str) -> str | None:
    """Return the name under which a model folder was published, if it says so.

    A folder in the cache of the Hugging Face hub carries it in its path, others may in the
    ``_name_or_path`` of their configuration.
    """
    path = Path(folder)
    for part in path.absolute().parts:
        if found := re.fullmatch(r"models--([^-].*?)--(.+)", part):
            return f"{found[1]}/{found[2]}"
    config = path / "config.json"
    named = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    name = str(named.get("_name_or_path", ""))
    return name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) else None
