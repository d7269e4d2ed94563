"""Bytes and names that outlive a loss of power, and what a disk says when it takes no more."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from trainer.errors import StorageError

HASH_BLOCK_BYTES = 8 << 20  # read at once: large for a file system, small for a cache
REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file is larger than allowed here (ulimit -f)",
    errno.EACCES: "no permission to write",
    errno.EPERM: "no permission to write",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
}


def sync_path(path: Path) -> None:
    """Put the bytes of a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and put its bytes on the disk; its name is there with its folder's."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def unique_suffix() -> str:
    """Name this process among all that may share a file system."""
    return f"{socket.gethostname()}-{os.getpid()}"


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that takes its name only when complete and on the disk."""
    aside = path.with_name(f".{path.name}.{unique_suffix()}")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def naming_the_disk(path: Path, remedy: str) -> Iterator[None]:
    """Turn errors of a full or closed disk into a StorageError; others stay as they are.

    Args:
        path: what is written.
        remedy: a sentence: what is kept and what to do.

    Raises:
        StorageError: disk full, quota reached or not writable, with the space that is free.
    """
    try:
        yield
    except OSError as error:
        reason = REASONS.get(error.errno or 0)
        if reason is None:
            raise
        free = shutil.disk_usage(nearest_existing(path)).free
        raise StorageError(
            f"cannot write {path}: {reason} ({error.strerror}); {free} bytes "
            f"({free / 1e9:.2f} GB) are free there. {remedy}"
        ) from error


def nearest_existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def hash_file(path: Path, count: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file; ``count`` is told the bytes read."""
    digest, block = hashlib.sha256(), memoryview(bytearray(HASH_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
            if count:
                count(size)
    return digest.hexdigest()
