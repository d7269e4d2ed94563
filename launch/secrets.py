"""Refuse configs that carry a secret: they are frozen to disk, logged and visible in job lists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trainer.errors import ConfigError
from trainer.metrics.redaction import SECRET_VALUE

_WORDS = {"secret", "password", "passwd", "passphrase", "credential", "credentials", "apikey"}
_LAST_WORDS = {"key", "token"}  # as a key's last word: api_key, hf_token; not num_key_value_heads
_HARMLESS = re.compile(r"(^|_)(pad|bos|eos|unk|cls|sep|mask|image|audio)_token$")
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY")
_HEX40 = re.compile(r"[0-9a-f]{40}")  # a wandb key; also a git commit, hence the names below
_COMMIT_WORDS = {"revision", "commit", "sha1", "hash", "digest"}


def looks_secret(key: str, value: Any) -> bool:
    """Return whether the dotted ``key`` or its ``value`` looks like a secret."""
    leaf = key.lower().rpartition(".")[2]
    words = re.split(r"[_\-]", leaf)
    if _WORDS.intersection(words) or (words[-1] in _LAST_WORDS and not _HARMLESS.search(leaf)):
        return True
    text = value if isinstance(value, str) else ""
    if _HEX40.fullmatch(text.strip("'\" ")) and not _COMMIT_WORDS.intersection(words):
        return True
    return bool(SECRET_VALUE.search(text) or _PRIVATE_KEY.search(text))


def refuse_secrets(pairs: Iterable[tuple[str, Any]]) -> None:
    """Raise ConfigError naming every key of ``pairs`` that looks secret; never print a value."""
    keys = sorted({key for key, value in pairs if looks_secret(key, value)})
    if keys:
        raise ConfigError(
            "\n".join(
                f"{key} looks like a secret (value not shown); configs are written to disk and "
                "logged, so put it into the environment (WANDB_API_KEY, HF_TOKEN) instead"
                for key in keys
            )
        )


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every leaf of nested dicts and lists."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, list) and any(isinstance(v, (Mapping, list)) for v in values):
        for index, value in enumerate(values):
            yield from flatten(value, f"{prefix}[{index}]")
    elif isinstance(values, list):
        yield prefix, values
        yield from ((prefix, value) for value in values)
    else:
        yield prefix, values
