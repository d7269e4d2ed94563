"""What makes a checkpoint folder whole: its manifest and files, checked without torch.

``committed.py`` builds on it where ranks share the work; ``kuroshio verify`` uses it on a login
node.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.disk import hash_file
from trainer.errors import CheckpointError

FORMAT = 1
MANIFEST_NAME = "manifest.json"
KEYS: dict[str, type] = {"step": int, "state": dict, "parameters": dict, "files": dict}


def list_steps(folder: Path) -> list[Path]:
    """Return committed checkpoint folders, newest first; other names are not ours."""
    return sorted((p for p in folder.glob("step_*") if _is_step(p.name)), reverse=True)


def _is_step(name: str) -> bool:
    digits = name.removeprefix("step_")
    return digits.isdecimal() and digits.isascii() and name == f"step_{int(digits):08d}"


def list_strangers(folder: Path) -> list[str]:
    """Return names of folders with a manifest that are no checkpoints by their name: renamed."""
    found = (path.parent.name for path in folder.glob(f"*/{MANIFEST_NAME}"))
    return sorted(name for name in found if not name.startswith(".") and not _is_step(name))


def list_leftovers(folder: Path) -> list[Path]:
    """Return what writes left aside that never were finished, or not tidied up."""
    return sorted(path for path in folder.glob(".*") if path.name not in (".", ".."))


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint folder.

    Raises:
        CheckpointError: saying why it is none that this version can read; nothing else of the
            folder was looked at.
    """
    try:
        text = (path / MANIFEST_NAME).read_text(encoding="utf-8")
        manifest = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(f"{type(error).__name__}: {error}") from error
    if not isinstance(manifest, dict):
        raise _unreadable(f"holds {type(manifest).__name__}, not an object")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"format {manifest.get('format')}, this version reads {FORMAT}")
    for key, kind in KEYS.items():
        if not isinstance(manifest.get(key), kind):
            raise _unreadable(f"{key} is no {kind.__name__}")
    if _is_step(path.name) and path.name != f"step_{manifest['step']:08d}":
        raise CheckpointError(f"is of step {manifest['step']} by its manifest: was it renamed?")
    for name, facts in manifest["files"].items():
        if Path(name).name != name or not _describes_file(facts):
            raise _unreadable(f"files.{name} is no plain file with bytes and sha256")
    for name, shape in manifest["parameters"].items():
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise _unreadable(f"parameters.{name} is no shape")
    return manifest


def _unreadable(reason: str) -> CheckpointError:
    return CheckpointError(f"manifest unreadable ({reason})")


def _describes_file(facts: Any) -> bool:
    if not isinstance(facts, dict):
        return False
    return type(facts.get("bytes")) is int and isinstance(facts.get("sha256"), str)


def file_problem(
    file: Path, facts: dict[str, Any], *, read: bool, count: Callable[[int], None] | None = None
) -> str:
    """Return what is wrong with a file, empty for nothing.

    Args:
        file: to look at.
        facts: the ``bytes`` and ``sha256`` it should have.
        read: whether to hash it, too.
        count: told the bytes read as they are.
    """
    try:
        if not file.is_file():
            return "is missing"
        if file.stat().st_size != facts["bytes"]:
            return f"has {file.stat().st_size} bytes instead of {facts['bytes']}"
        if read and hash_file(file, count) != facts["sha256"]:
            return "does not match its SHA-256"
    except OSError as error:
        return f"is unreadable ({error})"
    return ""
