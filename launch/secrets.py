"""Refuse configs that carry a secret: they are frozen to disk, logged and visible in job lists."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.metrics.redaction import PRIVATE_KEY, SECRET_VALUE, environment_secrets, redact_text

_WORDS = {"secret", "password", "passwd", "passphrase", "credential", "credentials", "apikey"}
_LAST_WORDS = {"key", "token"}  # as a key's last word: api_key, hf_token; not num_key_value_heads
_HARMLESS = re.compile(r"(^|_)(pad|bos|eos|unk|cls|sep|mask|image|audio)_token$")
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
    return any(SECRET_VALUE.search(t) or PRIVATE_KEY.search(t) for t in (key, text))


def refuse_secrets(
    pairs: Iterable[tuple[str, Any]], environ: Mapping[str, str] | None = None
) -> None:
    """Raise ConfigError naming every key of ``pairs`` that looks secret; never print a value.

    Args:
        pairs: dotted keys with their values.
        environ: whose secrets, whatever they look like, no value may hold; None = the process's.
    """
    known = environment_secrets(os.environ if environ is None else environ)
    keys = {
        key
        for key, value in pairs
        if looks_secret(key, value)
        or any(secret in text for secret in known for text in (key, str(value)))
    }
    if keys:
        raise ConfigError(
            "\n".join(
                f"{key} looks like a secret (value not shown); configs are written to disk and "
                "logged, so put it into the environment (WANDB_API_KEY, HF_TOKEN) instead"
                for key in sorted(map(redact_text, keys))
            )
        )


def secret_files(environ: Mapping[str, str]) -> list[Path]:
    """Return the files in which wandb and the Hugging Face libraries look for keys."""
    home = Path(environ.get("HOME") or Path.home())
    hub = Path(environ.get("HF_HOME") or home / ".cache/huggingface")
    return [
        Path(environ.get("NETRC") or home / ".netrc"),
        home / "_netrc",
        Path(environ.get("HF_TOKEN_PATH") or hub / "token"),
    ]


def open_secret_files(environ: Mapping[str, str]) -> list[Path]:
    """Return those of the ``secret_files`` that others than their owner may read or change."""
    there = [path for path in secret_files(environ) if path.is_file()]
    return [path for path in there if path.stat().st_mode & 0o077]


def open_file_problems(environ: Mapping[str, str]) -> list[str]:
    """Return what is wrong when a key of wandb would come from a file that others may read."""
    if environ.get("WANDB_API_KEY") or not (files := open_secret_files(environ)):
        return []
    names = " ".join(map(str, files))
    return [
        f"log.wandb=online: {names} can be read by others; chmod 600 {names}, and renew the keys "
        "in it if the machine is shared"
    ]


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
