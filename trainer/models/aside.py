"""Write a folder aside and let it appear only when it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from trainer.disk import naming_the_disk, sync_path
from trainer.errors import ConfigError

REMEDY = "Free some space or choose a run_dir elsewhere; nothing was left behind"


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
                sync_path(path)
            aside.rename(out_folder)
            sync_path(out_folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def naming_full_disk(target: Path) -> AbstractContextManager[None]:
    """Turn the system's errors of storage into ours.

    Raises:
        StorageError: disk full, quota reached, or not writable.
    """
    return naming_the_disk(target, REMEDY)
