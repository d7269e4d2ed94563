"""``metrics.jsonl``: the record of a run, one JSON object a line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.disk import write_synced
from trainer.errors import StorageError
from trainer.lease import Lease

JOURNAL_NAME = "metrics.jsonl"


def plain(value: Any) -> Any:
    """Return ``value`` with NaN and infinities as the words ``float()`` reads back.

    JSON has no such numbers, and dropping them would hide what went wrong.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def encode_line(record: dict[str, Any]) -> bytes:
    """Return one line of the journal."""
    text = json.dumps(plain(record), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"  # a lone surrogate as JSON escapes it


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file that may still be growing, if it exists."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # torn by a kill, or being written now
                continue
            if isinstance(record, dict):
                yield record


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a journal; a torn line is left out."""
    return (record for record in read_lines(path) if "split" in record and "step" in record)


def rewind(path: Path, step: int) -> tuple[int, int]:
    """Drop, atomically, what a dead life recorded after ``step``.

    At step 0 a life starts over, so its measurements at step 0 go as well and only events stay.

    Returns:
        Number of dropped records and the last step among them (``step`` if none).
    """
    kept: list[dict[str, Any]] = []
    num_dropped, last_step = 0, step
    for record in read_journal(path):
        if record["step"] <= step and (step > 0 or record["split"] == "event"):
            kept.append(record)
        else:
            num_dropped += 1
            last_step = max(last_step, record["step"])
    data = b"".join(map(encode_line, kept))
    if path.exists() and path.read_bytes() != data:
        _replace(path, data)
    return num_dropped, last_step


def _replace(path: Path, data: bytes) -> None:
    """Write ``data`` aside, flush it to the disk, and put it in the place of ``path``."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_synced(aside, data)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise _storage_error(path, error) from error


class Journal:
    """Append records to ``metrics.jsonl``; a line is whole or absent."""

    def __init__(self, path: Path, lease: Lease | None = None) -> None:
        """Open for appending.

        Args:
            path: of the journal.
            lease: the right to append; None where nobody else can.

        Raises:
            StorageError: when the file cannot be opened.
        """
        self.path, self.lease = path, lease
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise _storage_error(path, error) from error

    def write(self, record: dict[str, Any]) -> None:
        """Append one record.

        Raises:
            StorageError: disk full, quota reached or the like; the file then ends before the line.
            LeaseError: a newer life writes the journal.
        """
        if self.lease:
            self.lease.check()
        line = encode_line(record)
        start = self._file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            os.truncate(self.path, start)
            raise _storage_error(self.path, error) from error

    def close(self) -> None:
        """Flush to the disk and close."""
        try:
            if not self._file.closed and self._file.seekable():
                os.fsync(self._file.fileno())
        except OSError as error:
            raise _storage_error(self.path, error) from error
        finally:
            self._file.close()


def _storage_error(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot write {path}: {error.strerror or error}; free space or choose another run_dir, "
        "then start the same command again to resume"
    )
