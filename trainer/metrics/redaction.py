"""Find values that look like secrets in a configuration and blank them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

REDACTED = "[redacted]"
SECRET_KEY = re.compile(
    r"(^|[_\-.])(api[_-]?key|secret|password|passwd|passphrase|credentials?|private[_-]?key"
    r"|(access|auth|api|bearer|hf|hub|session|wandb|github|gitlab)[_-]?token)([_\-.]|$)|^token$",
    re.IGNORECASE,
)
# Prefixes that issuers give their keys, and a user:password pair inside a URL.
SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|glpat-[A-Za-z0-9_-]{16,}|AKIA[A-Z0-9]{16}|wandb_v1_[A-Za-z0-9_]{20,})|://[^/\s:@]+:[^/\s@]+@"
)


def find_secrets(config: Any, where: str = "") -> Iterator[str]:
    """Yield the dotted keys of nested ``config`` that name or hold a secret."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            place = f"{where}.{key}" if where else str(key)
            if isinstance(value, str) and value and SECRET_KEY.search(str(key)):
                yield place
            else:
                yield from find_secrets(value, place)
    elif isinstance(config, (list, tuple)):
        for index, value in enumerate(config):
            yield from find_secrets(value, f"{where}[{index}]")
    elif isinstance(config, str) and SECRET_VALUE.search(config):
        yield where


def redact(config: Any, where: str = "") -> Any:
    """Return a copy of nested ``config`` in which every found secret reads ``[redacted]``."""
    secrets = set(find_secrets(config, where))

    def copy(value: Any, place: str) -> Any:
        if place in secrets:
            return REDACTED
        if isinstance(value, Mapping):
            return {k: copy(v, f"{place}.{k}" if place else str(k)) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [copy(v, f"{place}[{i}]") for i, v in enumerate(value)]
        return value

    return copy(config, where)
