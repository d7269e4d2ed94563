"""A shard is written in blocks, past the page cache where that is possible."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from trainer.engine import shard_file


def test_a_shard_of_many_blocks_is_what_its_hash_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of all lengths, whole blocks, an end; past the page cache, through it, and refused."""
    monkeypatch.setattr(shard_file, "BLOCK_BYTES", 8 * mmap.PAGESIZE)
    lengths = [1, 5000, 3 * 8 * mmap.PAGESIZE + 7, 0, 40_000]
    pieces = [memoryview(bytes([number]) * length) for number, length in enumerate(lengths, 1)]
    content = b"".join(pieces)
    expected = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for name, sync in (("synced", True), ("cached", False)):
        assert shard_file.write_blocks(tmp_path / name, pieces, sync=sync) == expected
        assert (tmp_path / name).read_bytes() == content

    real = fcntl.fcntl

    def refuse(file: BinaryIO, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "as tmpfs says")
        return real(file, command, flags)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert shard_file.write_blocks(tmp_path / "refused", pieces) == expected
    assert (tmp_path / "refused").read_bytes() == content


def test_a_device_of_larger_pages_gets_its_blocks_through_the_cache(tmp_path: Path) -> None:
    """Its writes past the cache are refused one by one; a short one leaves an odd rest."""

    class Device:
        """Refuses what does not go through the cache, and takes 5,000 bytes at once."""

        def __init__(self, file: BinaryIO) -> None:
            self.file, self.refused = file, 0

        def fileno(self) -> int:
            return self.file.fileno()

        def write(self, piece: memoryview) -> int:
            if fcntl.fcntl(self.file, fcntl.F_GETFL) & os.O_DIRECT:
                self.refused += 1
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return self.file.write(piece[:5000])

    content = os.urandom(3 * mmap.PAGESIZE)
    with (tmp_path / "file").open("wb", buffering=0) as file:
        device = Device(file)  # type: ignore[arg-type]
        if not shard_file._bypass_cache(device, True):  # type: ignore[arg-type]
            pytest.skip("this file system knows only the page cache")
        shard_file._write_all(device, memoryview(content))  # type: ignore[arg-type]
    assert device.refused == 1
    assert (tmp_path / "file").read_bytes() == content
