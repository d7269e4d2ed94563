"""Files are whole or not there, and a disk that takes no more is named."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from trainer.disk import (
    HASH_BLOCK_BYTES,
    hash_file,
    naming_the_disk,
    nearest_existing,
    whole_file,
    write_synced,
)
from trainer.errors import StorageError


def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with whole_file(path) as file:
        file.write(b"one")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write(b"half of ano")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_disk_that_takes_no_more_is_named_with_its_room(tmp_path: Path, number: int) -> None:
    path = tmp_path / "missing/file"
    said = r"missing/file: .*GB\) are free.*Make room"
    with pytest.raises(StorageError, match=said) as caught, naming_the_disk(path, "Make room"):
        raise OSError(number, os.strerror(number))
    assert isinstance(caught.value.__cause__, OSError)
    assert nearest_existing(path) == tmp_path


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output"), naming_the_disk(tmp_path, "Make room"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("size", [0, 3, HASH_BLOCK_BYTES, HASH_BLOCK_BYTES + 1])
def test_a_hash_is_of_all_blocks(tmp_path: Path, size: int) -> None:
    data, counted = os.urandom(size), list[int]()
    write_synced(tmp_path / "file", data)
    assert hash_file(tmp_path / "file", counted.append) == hashlib.sha256(data).hexdigest()
    assert sum(counted) == size
