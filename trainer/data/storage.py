"""Writing files of the store so that each is either whole or not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

from trainer import disk

REMEDY = (
    "What was finished before is kept: make room (or change data.store_dir) and start the same "
    "command again"
)


def naming_the_disk(path: Path) -> AbstractContextManager[None]:
    """Turn errors of a full or closed disk into a StorageError that names path and free space."""
    return disk.naming_the_disk(path, REMEDY)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that takes its name only when complete and on the disk.

    Raises:
        StorageError: the disk is full or closed; nothing is left behind.
    """
    with naming_the_disk(path), disk.whole_file(path) as file:
        yield file


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` in one step, making its folder when it is missing.

    Raises:
        StorageError: the disk is full or closed.
    """
    with naming_the_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(content)
