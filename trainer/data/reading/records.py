"""Records and documents, and the log of rows that could not become one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from trainer.data.reading.raw import Row, RowError, printable
from trainer.data.storage import naming_the_disk
from trainer.errors import DataError

EXCERPT_CHARS = 120
MIN_ROWS_TO_JUDGE = 1000  # a share over fewer rows says little; the check at the end has no minimum


@dataclass(frozen=True)
class Document:
    """One text and where it came from; ``row`` is the 1-based line (or record) of ``file``."""

    text: str
    source: str
    file: str
    row: int


@dataclass(frozen=True)
class Reject:
    """One row that was left out, and why."""

    file: str
    row: int
    reason: str
    excerpt: str


class JsonLine(bytes):
    """A line that holds one JSON object, not yet parsed."""


def parse_record(value: bytes | dict[str, Any] | RowError) -> dict[str, Any]:
    """Return the record of a raw row: as it is, or parsed from a line of JSON.

    Raises:
        RowError: with the reason there is none.
    """
    if isinstance(value, RowError):
        raise value
    if isinstance(value, dict):
        return value
    try:
        record = json.loads(decode_utf8(value))
    except (ValueError, RecursionError) as error:
        if isinstance(error, RowError):
            raise
        raise RowError(f"malformed JSON: {error}") from error
    if not isinstance(record, dict):
        raise RowError(f"expected a JSON object, got {type(record).__name__}")
    return record


def decode_utf8(value: bytes) -> str:
    """Return the text of bytes that should be UTF-8.

    Raises:
        RowError: they are not, or come from another encoding and were not of that.
    """
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        byte, place = value[error.start], f"at offset {error.start}"
        triple = value[error.start : error.start + 3]
        if byte == 0xED and len(triple) == 3 and triple[1] >= 0xA0:  # left by the transcoder
            code = ord(triple.decode("utf-8", "surrogatepass"))
            reason = f"byte 0x{code & 0xFF:02x} {place} is not of the file's encoding"
        else:
            reason = f"invalid UTF-8: byte 0x{byte:02x} {place}"
        raise RowError(reason) from error


def excerpt(value: str | bytes) -> str:
    """Return the start of ``value``, printable whatever bytes it holds."""
    if isinstance(value, bytes):
        value = value[: 4 * EXCERPT_CHARS].decode("utf-8", errors="backslashreplace")
    return value[:EXCERPT_CHARS]


class RejectLog:
    """Count read, accepted and rejected rows; write the rejected ones to a JSONL file.

    The file appears with the first rejected row. ``num_accepted + num_rejected == num_read`` holds
    at any time.

    Args:
        path: JSONL to write (replaced if it exists); None only counts.
        max_bad_row_share: largest tolerated ``num_rejected / num_read``.
    """

    def __init__(self, path: Path | None, max_bad_row_share: float) -> None:
        self.path = path
        self.max_bad_row_share = max_bad_row_share
        self.num_accepted = 0
        self.num_rejected = 0
        self.last: Reject | None = None
        self._file: TextIO | None = None

    @property
    def num_read(self) -> int:
        """Rows seen so far."""
        return self.num_accepted + self.num_rejected

    def accept(self, num_rows: int = 1) -> None:
        """Count rows that became documents."""
        self.num_accepted += num_rows

    def reject(self, reject: Reject) -> None:
        """Count and write one rejected row.

        Raises:
            DataError: when the share of rejected rows is above the limit.
            StorageError: when the row cannot be written.
        """
        self.num_rejected += 1
        self.last = reject
        if self.path is not None:
            with naming_the_disk(self.path):
                if self._file is None:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self._file = self.path.open("w", encoding="utf-8")
                # ASCII escapes: a lone surrogate can be written, and read back, only this way.
                self._file.write(json.dumps(vars(reject)) + "\n")
        if self.num_read >= MIN_ROWS_TO_JUDGE:
            self.check_share()

    def reject_row(self, row: Row, path: Path, reason: str) -> None:
        """Count and write a raw row of ``path``; raises as ``reject`` does."""
        sample = row.value if isinstance(row.value, bytes) else repr(row.value)
        self.reject(Reject(str(path), row.number, printable(reason), excerpt(sample)))

    def check_share(self) -> None:
        """Raise when too many of the rows read so far were rejected.

        Raises:
            DataError: with the counts, the last rejected row and the key to change.
        """
        if self.last is None or self.num_rejected <= self.max_bad_row_share * self.num_read:
            return
        last, log = self.last, f"; all of them are in {self.path}" if self.path else ""
        self.close()
        raise DataError(
            f"{self.num_rejected} of {self.num_read} rows rejected, "
            f"{self.num_rejected / self.num_read:.2%}, above data.max_bad_row_share="
            f"{self.max_bad_row_share:g}; the last: {last.file}:{last.row}: {last.reason}{log}. "
            "Repair the file, or raise data.max_bad_row_share if these rows may be left out"
        )

    def close(self) -> None:
        """Flush and close the file."""
        if self._file is not None and self.path is not None:
            with naming_the_disk(self.path):
                self._file.close()
            self._file = None
