"""Models that bring code of their own: refused, unless exactly that code was allowed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from trainer.config import ModelConfig
from trainer.errors import ConfigError

IMPLEMENTATION = "_implementation"  # ends the keys that choose attention and experts


def runs_own_code(model: ModelConfig, architecture: Mapping[str, Any]) -> bool:
    """Return whether the model's own code is to be run, which the run must have allowed.

    A folder whose architecture transformers knows is loaded by transformers' own classes, also
    when it brings code, as long as ``model.trust_remote_code`` is off.

    Raises:
        ConfigError: code is needed and not allowed, or it is not the code that was allowed.
    """
    code = architecture.get("auto_map")
    known = architecture.get("model_type") in CONFIG_MAPPING_NAMES
    if model.path is None or not code or (known and not model.trust_remote_code):
        return False
    if elsewhere := [value for value in _classes(code) if "--" in value]:
        raise ConfigError(
            f"model.path={model.path} names code in another repository ({elsewhere[0]}), which "
            "could change at any time; copy its .py files into the folder and drop what stands "
            'before "--" in the auto_map of config.json'
        )
    pin = code_pin(Path(model.path))
    if not model.trust_remote_code:
        raise ConfigError(
            f"model.path={model.path}: transformers does not know model_type="
            f"{architecture.get('model_type')}; the folder brings its own code "
            f"({', '.join(_files(Path(model.path)))}), which would run with all your rights. Read "
            "it, then allow exactly this version with model.trust_remote_code=true "
            f"model.revision={pin}"
        )
    if model.revision != pin:
        raise ConfigError(
            f"model.revision={model.revision} is not the code in model.path={model.path}, whose "
            f"revision is {pin}: it is another version than the one allowed. Read it again, then "
            "give that revision"
        )
    return True


def refuse_fetched_kernels(architecture: Mapping[str, Any], where: str) -> None:
    """Refuse a config that names kernels of a repository, ``attn_implementation: org/name``.

    transformers fetches such compiled code and runs it, whatever is said of remote code.

    Raises:
        ConfigError: naming the key.
    """
    for key, value in architecture.items():
        if isinstance(value, Mapping) and not key.endswith(IMPLEMENTATION):
            refuse_fetched_kernels(value, f"{where}: {key}")
        elif key.endswith(IMPLEMENTATION) and "/" in str(value):
            raise ConfigError(
                f"{where}: {key}={value!r} names compiled code in a repository, which would be "
                f"fetched and run; remove {key} from config.json: attention is chosen here"
            )


def code_pin(folder: Path) -> str:
    """Return the SHA-256 over names and contents of all .py files of a folder."""
    digest = hashlib.sha256()
    for name in _files(folder):
        content = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        digest.update(f"{content}  {name}\n".encode())
    return digest.hexdigest()


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))


def _classes(auto_map: Mapping[str, Any]) -> list[str]:
    """Return the references of an auto_map: MODULE.CLASS, some in pairs."""
    values = auto_map.values()
    pairs = [value if isinstance(value, (list, tuple)) else [value] for value in values]
    return [str(value) for pair in pairs for value in pair if value]
