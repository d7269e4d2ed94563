"""Find what looks like a secret, in a configuration or in a text, and blank it."""

from __future__ import annotations

import io
import os
import re
import sys
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

PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY(-----[^-]*(-----END [A-Z ]*KEY-----)?)?")
SECRET_VARIABLE = re.compile(  # of the environment: what a name ends with
    r"(^|_)(key|apikey|token|secret|password|passwd|passphrase|credentials?)$", re.IGNORECASE
)
MIN_SECRET_CHARS = 8  # shorter ones would blank ordinary words


def environment_secrets(environ: Mapping[str, str]) -> list[str]:
    """Return the values of variables whose names say that they are secret, longest first.

    Paths are none: of a file with a key, the name may be told.
    """
    found = {
        value
        for name, value in environ.items()
        if SECRET_VARIABLE.search(name)
        and len(value) >= MIN_SECRET_CHARS
        and not value.startswith(("/", "~", "./"))
    }
    return sorted(found, key=lambda value: (-len(value), value))


def secret_pattern(environ: Mapping[str, str]) -> re.Pattern[str]:
    """Return what finds the secrets of an environment, and what looks like one, in any text."""
    known = [re.escape(value) for value in environment_secrets(environ)]
    return re.compile("|".join([*known, SECRET_VALUE.pattern, PRIVATE_KEY.pattern]))


def redact_text(text: str, pattern: re.Pattern[str] | None = None) -> str:
    """Return ``text`` with every secret in it blanked; ``pattern`` is of ``secret_pattern``."""
    pattern = pattern or secret_pattern(os.environ)
    return pattern.sub(lambda found: _blank(found[0]), text)


def _blank(secret: str) -> str:
    return f"://{REDACTED}@" if secret.startswith("://") else REDACTED


class RedactedStream(io.TextIOWrapper):
    """A text stream in which no secret is written out."""

    def __init__(self, stream: io.TextIOWrapper, environ: Mapping[str, str]) -> None:
        """Write to the buffer of ``stream``, which must not be used any more."""
        super().__init__(
            stream.buffer,
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        self._secrets = secret_pattern(environ)

    def write(self, text: str) -> int:
        """Write ``text``; the characters of a blanked secret count as written."""
        super().write(redact_text(text, self._secrets))
        return len(text)


def redact_output(environ: Mapping[str, str]) -> None:
    """Let nothing that this process prints, logs or complains of show a secret."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # not one that a test has put there
            stream.flush()
            setattr(sys, name, RedactedStream(stream, environ))


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
