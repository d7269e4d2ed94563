"""What a prepared source depends on, as a hash."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from trainer import disk
from trainer.config import SourceConfig
from trainer.data.chats.layout_search import find_layout
from trainer.data.chats.layouts import Content, Layout
from trainer.data.reading.files import detect_format, list_files, naming_the_file
from trainer.data.storage import write_atomically

# Raise when readers or encoder change what they make of the same bytes.
PREPARATION = "kuroshio-prepare-2"
HASHES = "hashes"  # folder of the store that remembers hashes of source files


@dataclass(frozen=True)
class SourceFile:
    """A file of a source, as it will be read."""

    path: Path
    format: str
    num_bytes: int  # on disk
    sha256: str
    layout: Layout | None = None  # of conversations; None for texts


@dataclass(frozen=True)
class SourcePlan:
    """A source's files and the folder its tokens go to."""

    name: str
    source: SourceConfig
    files: Sequence[SourceFile]
    key: str
    folder: Path
    min_chars: int
    content: str  # as in ``DataConfig``

    @property
    def work_folder(self) -> Path:
        """Where shards are collected until the source is committed."""
        return self.folder.with_name(f"{self.folder.name}.work")


def plan_source(
    name: str,
    source: SourceConfig,
    *,
    store_dir: Path,
    tokenizer_key: str,
    min_chars: int,
    content: str,
    chat: Mapping[str, Any] | None = None,
) -> SourcePlan:
    """Hash a source's files, reading options and tokenizer into the name of its folder.

    Paths, weights and shares are left out: moving files or mixing them otherwise prepares nothing
    anew.

    Args:
        name: the source's name.
        source: its files and options.
        store_dir: where prepared sources are.
        tokenizer_key: the tokenizer's fingerprint.
        min_chars: shorter texts are left out.
        content: of ``data.content``.
        chat: for all but documents: what decides the encoding, template and length among it.

    Raises:
        DataError: a file is missing, empty, unreadable or holds no conversations.
    """
    paths = list_files(source)
    with ThreadPoolExecutor() as threads:  # hashing and waiting for the disk leave Python free
        hashes = threads.map(lambda path: hash_file(path, store_dir / HASHES), paths)
        files = [
            _source_file(path, source, sha256, content)
            for path, sha256 in zip(paths, hashes, strict=True)
        ]
    parts: dict[str, Any] = {
        "preparation": PREPARATION,
        "files": [[file.sha256, file.format] for file in files],
        "tokenizer": tokenizer_key,
    }
    if chat is None:
        parts |= {"text_columns": source.text_columns, "min_chars": min_chars}
        parts |= {"encoding": source.encoding, "sheet": source.sheet}
    else:
        parts |= {"chat": chat, "layouts": [asdict(f.layout) for f in files if f.layout]}
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    readable = re.sub(r"[^\w-]", "_", name)
    folder = store_dir / f"{readable}-{key[:16]}"
    return SourcePlan(name, source, files, key, folder, min_chars, content)


def _source_file(path: Path, source: SourceConfig, sha256: str, content: str) -> SourceFile:
    layout = None if content == "documents" else find_layout(path, source, cast(Content, content))
    if layout is not None:
        format_name = layout.format
    else:
        format_name = detect_format(path, source.format, source.encoding)
    return SourceFile(path, format_name, path.stat().st_size, sha256, layout)


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
        found = disk.hash_file(path)
    write_atomically(cached, json.dumps({"seen": seen, "sha256": found}).encode())
    return found


def _recall(cached: Path, seen: Sequence[str | int]) -> str | None:
    """Return the hash of a file that was looked at before and looks the same, else None."""
    try:
        entry = json.loads(cached.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None  # never seen, or its note was damaged: hash again
    return str(entry["sha256"]) if entry.get("seen") == seen else None
