"""The end of a growing JSON-lines file, read without the rest of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCK_BYTES = 1 << 16
MAX_BYTES = 1 << 22  # how far back to look for a record: tables and samples may be long

Record = dict[str, Any]


def read_tail(
    path: Path, is_enough: Callable[[list[Record]], bool], max_bytes: int = MAX_BYTES
) -> list[Record]:
    """Return the last records of a file, oldest first; a line being written now is left out.

    Args:
        path: file with one JSON object a line; it need not exist.
        is_enough: told the records read so far; False reads twice as far back.
        max_bytes: read no more than that.
    """
    size = BLOCK_BYTES
    while True:
        data, is_whole = _last_bytes(path, size)
        records = _parse(data, is_whole)
        if is_whole or size >= max_bytes or is_enough(records):
            return records
        size *= 2


def _last_bytes(path: Path, size: int) -> tuple[bytes, bool]:
    """Return the last bytes of a file and whether they are all of it."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - size)
            file.seek(start)
            return file.read(size), start == 0
    except FileNotFoundError:
        return b"", True


def _parse(data: bytes, is_whole: bool) -> list[Record]:
    lines = data.split(b"\n")
    records = []
    for line in lines if is_whole else lines[1:]:  # the first may have lost its beginning
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # empty, torn by a kill, or being written
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
