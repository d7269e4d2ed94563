"""What a prepared source depends on, as a hash."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trainer.config import SourceConfig
from trainer.data.files import detect_format, list_files, naming_the_file
from trainer.data.storage import sha256_of, write_atomically

# Raise when readers or encoder change what they make of the same bytes.
PREPARATION = "kuroshio-prepare-1"
HASHES = "hashes"  # folder of the store that remembers hashes of source files


@dataclass(frozen=True)
class SourceFile:
    """A file of a source, as it will be read."""

    path: Path
    format: str
    num_bytes: int  # on disk
    sha256: str


@dataclass(frozen=True)
class SourcePlan:
    """A source's files and the folder its tokens go to."""

    name: str
    source: SourceConfig
    files: Sequence[SourceFile]
    key: str
    folder: Path
    min_chars: int

    @property
    def work_folder(self) -> Path:
        """Where shards are collected until the source is committed."""
        return self.folder.with_name(f"{self.folder.name}.work")


def plan_source(
    name: str, source: SourceConfig, *, store_dir: Path, tokenizer_key: str, min_chars: int
) -> SourcePlan:
    """Hash a source's files, reading options and tokenizer into the name of its folder.

    Paths, weights and shares are left out: moving files or mixing them otherwise prepares nothing
    anew.

    Raises:
        DataError: a file is missing, empty or unreadable.
    """
    paths = list_files(source)
    with ThreadPoolExecutor() as threads:  # hashing and waiting for the disk leave Python free
        hashes = threads.map(lambda path: hash_file(path, store_dir / HASHES), paths)
        files = [
            SourceFile(path, detect_format(path, source.format), path.stat().st_size, sha256)
            for path, sha256 in zip(paths, hashes, strict=True)
        ]
    parts = {
        "preparation": PREPARATION,
        "files": [[file.sha256, file.format] for file in files],
        "text_columns": source.text_columns,
        "tokenizer": tokenizer_key,
        "min_chars": min_chars,
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    readable = re.sub(r"[^\w-]", "_", name)
    return SourcePlan(name, source, files, key, store_dir / f"{readable}-{key[:16]}", min_chars)


def hash_file(path: Path, cache_folder: Path) -> str:
    """Return the SHA-256 of a file, remembered as long as its size and time of change stay.

    Raises:
        DataError: the file cannot be read.
        StorageError: the memory of the hash cannot be written.
    """
    path = path.resolve()
    with naming_the_file(path):
        stat = path.stat()
    seen: list[str | int] = [str(path), stat.st_size, stat.st_mtime_ns]
    name = hashlib.blake2b(str(path).encode(), digest_size=16).hexdigest()
    cached = cache_folder / f"{name}.json"
    known = _recall(cached, seen)
    if known is not None:
        return known
    with naming_the_file(path):
        found = sha256_of(path)
    write_atomically(cached, json.dumps({"seen": seen, "sha256": found}).encode())
    return found


def _recall(cached: Path, seen: Sequence[str | int]) -> str | None:
    """Return the hash of a file that was looked at before and looks the same, else None."""
    try:
        entry = json.loads(cached.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None  # never seen, or its note was damaged: hash again
    return str(entry["sha256"]) if entry.get("seen") == seen else None
