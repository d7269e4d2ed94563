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
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        for path in aside.iterdir():
            _fsync(path)
        aside.rename(out_folder)
        _fsync(out_folder.parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        if error.errno in NO_ROOM + NOT_WRITABLE:
            free = shutil.disk_usage(_existing(out_folder)).free
            raise StorageError(
                f"{out_folder} could not be written: {error.strerror} ({free:,} bytes free there); "
                "free some space or choose a run_dir elsewhere; nothing was left behind"
            ) from error
        raise
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _existing(path: Path) -> Path:
    """Return the nearest parent that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
