"""Write a folder aside and let it appear only when it is whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import ConfigError, StorageError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def written_aside(out_folder: Path) -> Iterator[Path]:
    """Give a folder to write into that becomes ``out_folder`` only when all went well.

    Raises:
        ConfigError: ``out_folder`` exists.
        StorageError: disk full, quota reached, or not writable; what was written is removed.
    """
    if out_folder.exists():
        raise ConfigError(f"{out_folder} exists; remove it or choose another run_dir")
    aside = out_folder.with_name(f".{out_folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with naming_full_disk(out_folder):
            aside.mkdir(parents=True)
            yield aside
            for path in aside.iterdir():
                _fsync(path)
            aside.rename(out_folder)
            _fsync(out_folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def naming_full_disk(target: Path) -> Iterator[None]:
    """Turn the system's errors of storage into ours.

    Raises:
        StorageError: disk full, quota reached, or not writable.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM + NOT_WRITABLE:
            raise
        free = shutil.disk_usage(_existing(target)).free
        raise StorageError(
            f"{target} could not be written: {error.strerror} ({free:,} bytes free there); "
            "free some space or choose a run_dir elsewhere; nothing was left behind"
        ) from error


def _existing(path: Path) -> Path:
    """Return the nearest parent that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
