"""Writing files so that each is either whole or not there."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from trainer.errors import StorageError

FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up"}
FULL |= {errno.EFBIG: "the file is larger than allowed here (ulimit -f)"}
CLOSED = {errno.EACCES: "no permission to write", errno.EROFS: "the file system is read-only"}
CLOSED |= {errno.ENOTDIR: "a part of this path is a file, not a folder"}


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unique_suffix() -> str:
    """Name this process among all that may share a file system."""
    return f"{socket.gethostname()}-{os.getpid()}"


@contextmanager
def naming_the_disk(path: Path) -> Iterator[None]:
    """Turn errors of a full or closed disk into a StorageError that names path and free space."""
    try:
        yield
    except OSError as error:
        reason = (FULL | CLOSED).get(error.errno or 0)
        if reason is None:
            raise
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        raise StorageError(
            f"cannot write {path}: {reason}; {free} bytes ({free / 1e9:.2f} GB) are free there. "
            "What was finished before is kept: make room (or change data.store_dir) and start the "
            "same command again"
        ) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that takes its name only when complete and on the disk.

    Raises:
        StorageError: the disk is full or closed; nothing is left behind.
    """
    aside = path.with_name(f".{path.name}.{unique_suffix()}")
    with naming_the_disk(path):
        try:
            with aside.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            aside.rename(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` in one step, making its folder when it is missing.

    Raises:
        StorageError: the disk is full or closed.
    """
    with naming_the_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(content)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
