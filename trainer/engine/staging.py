"""A node-local folder that takes what is saved at once, until it is copied into the run folder."""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path

from trainer.engine.checkpoint import shard_name
from trainer.errors import ConfigError, StorageError
from trainer.lease import Lease


class Staging:
    """This rank's place in ``loop.staging_dir``; nothing in it outlives the run's next life there.

    Args:
        staging_dir: node-local; environment variables in it are replaced.
        folder: the run's ``checkpoints`` folder, after which the run's own part is named.
        lease: of this life; None where there is one only.
        rank: of this process.

    Raises:
        ConfigError: a variable in it is not set.
        StorageError: it cannot be written.
    """

    def __init__(self, staging_dir: str, folder: Path, lease: Lease | None, rank: int) -> None:
        place = os.path.expandvars(staging_dir)
        if "$" in place:
            raise ConfigError(
                f"loop.staging_dir={staging_dir} names a variable that is not set on this node; "
                "give a node-local folder that exists there, or null"
            )
        name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
        self._own = Path(place) / f"kuroshio_{name}" / f"life_{lease.token if lease else 0}"
        self.shard = self._own / shard_name(rank)
        try:
            self._own.mkdir(parents=True, exist_ok=True)
            for path in self._own.parent.iterdir():
                if path != self._own:  # of lives that were killed before they could copy it
                    shutil.rmtree(path, ignore_errors=True)
            self.shard.write_bytes(b"")
            self.shard.unlink()
        except OSError as error:
            raise StorageError(
                f"loop.staging_dir={staging_dir} cannot be written: {error}; give a node-local "
                "folder that you may write, or null"
            ) from error

    def close(self) -> None:
        """Delete this rank's file, and the folders when all ranks have."""
        self.shard.unlink(missing_ok=True)
        with suppress(OSError):  # not empty: another rank of this node is still copying
            self._own.rmdir()
            self._own.parent.rmdir()
