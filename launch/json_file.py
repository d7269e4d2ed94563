"""Small JSON files that are read while they are written: whole, or named as damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.errors import CheckpointError, StorageError


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON object; None when there is no such file.

    Raises:
        CheckpointError: a file that holds something else.
        StorageError: one that cannot be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        why = "is it another user's, or does its disk fail?"
        raise StorageError(f"{path} cannot be read: {error.strerror}; {why}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; bring it back") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; bring it back")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a file so that a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)  # of a disk that is full
