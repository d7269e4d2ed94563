"""Which files a source names, and what is in them: compression and format, told by content."""

from __future__ import annotations

import gzip
import io
import json
import logging
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from glob import glob, has_magic
from pathlib import Path
from typing import IO

import pyarrow as pa

from tokenizer.hub import how_to_fetch
from trainer.config import SourceConfig, nearest
from trainer.data.reading.encodings import as_utf8, check_encoding, guess_encoding
from trainer.data.reading.llama_factory import INFO_FILE, read_entries
from trainer.errors import DataError

FORMATS = ("txt", "lines", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "xlsx", "xls")
EXTENSIONS = {f".{name}": name for name in FORMATS} | {".ndjson": "jsonl", ".xlsm": "xlsx"}
BINARY_MAGIC = {
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "arrow",
    b"PK\x03\x04": "xlsx",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "xls",  # also the envelope of an encrypted xlsx
}
BINARY_FORMATS = frozenset(BINARY_MAGIC.values())
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
BOM = b"\xef\xbb\xbf"
SNIFF_BYTES = 1 << 16
MAX_ASCII_BYTES = 1 << 26  # looked through for the first other character
# A broken length may ask for more memory than there is.
READ_ERRORS = (OSError, EOFError, UnicodeError, MemoryError, zlib.error, pa.ArrowException)

logger = logging.getLogger(__name__)


def list_files(source: SourceConfig) -> list[Path]:
    """Return the files of ``source.paths`` in a fixed order, each once.

    With ``source.datasets`` they are the files of these entries of a ``dataset_info.json``. Else a
    folder stands for every file below it with a known extension, or for its Arrow files in their
    own order when ``datasets.save_to_disk`` wrote it; globs are sorted by name.

    Raises:
        DataError: when a path matches nothing, or a folder holds no readable file.
    """
    if source.datasets:
        paths = [entry.path for entry in read_entries(source)]
        listed = [_list_folder(path) if path.is_dir() else [path] for path in paths]
        return list(dict.fromkeys(file for files in listed for file in files))
    found: dict[Path, None] = {}
    for name in source.paths:
        path = Path(name).expanduser()
        if path.is_dir():
            matches = _list_folder(path)
        elif path.exists() or not has_magic(name):
            matches = [path]
        else:
            names = sorted(glob(str(path), recursive=True))  # noqa: PTH207 (absolute patterns too)
            folded = [_list_folder(Path(n)) if Path(n).is_dir() else [Path(n)] for n in names]
            matches = [file for files in folded for file in files]
        if not matches or not matches[0].exists():
            raise DataError(
                f"data source path {name!r} matches no file (seen from {Path.cwd()}); "
                f"correct the path or the glob{how_to_fetch(name, 'dataset')}"
            )
        found |= dict.fromkeys(matches)
    return list(found)


def _list_folder(folder: Path) -> list[Path]:
    """Return the data files below ``folder``."""
    if (folder / "dataset_dict.json").exists():
        splits = sorted(child.name for child in folder.iterdir() if child.is_dir())
        raise DataError(
            f"{folder} is a DatasetDict with the splits {', '.join(splits)}; name one of them, "
            f"e.g. {folder / (splits or ['train'])[0]}"
        )
    state = folder / "state.json"
    if state.exists() and (folder / "dataset_info.json").exists():
        return [folder / file["filename"] for file in json.loads(state.read_text())["_data_files"]]
    files, ignored = [], []
    for child in sorted(folder.iterdir()):
        if child.name.startswith("."):
            continue
        if child.is_dir():
            files += _list_folder(child)
        elif child.name == INFO_FILE:
            logger.info("%s is there: name its datasets to read them as it says", child)
        elif _extension(child) in EXTENSIONS:
            files.append(child)
        else:
            ignored.append(child.name)
    if ignored:
        logger.warning("%s: no data file by name, not read: %s", folder, ", ".join(ignored[:10]))
    return files


def _extension(path: Path) -> str:
    """Return the extension below a compression's, in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in (".gz", ".zst", ".zstd"):
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextmanager
def naming_the_file(path: Path) -> Iterator[None]:
    """Turn errors of reading ``path`` into a DataError that names it."""
    try:
        yield
    except READ_ERRORS as error:
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{path} cannot be read: {reason}; it may be damaged, truncated or unreadable for this "
            "user"
        ) from error


def open_bytes(path: Path, encoding: str = "utf-8") -> IO[bytes]:
    """Open ``path``, decompressed as its first bytes tell, in UTF-8 without a byte-order mark.

    Args:
        path: file to read.
        encoding: of its text, transcoded on the way; UTF-8 and binary files pass untouched.

    Raises:
        DataError: when the file is empty or cannot be opened.
    """
    with naming_the_file(path):
        stream: IO[bytes] = path.open("rb")
        magic = stream.read(4)
        stream.seek(0)
        compression = next((v for k, v in COMPRESSIONS.items() if magic.startswith(k)), None)
        if compression == "gzip":
            stream = io.BufferedReader(gzip.GzipFile(fileobj=stream))  # type: ignore[arg-type]
        elif compression == "zstd":
            # Arrow's decompressor reports a truncated file; zstandard's reader ends quietly.
            arrow = pa.CompressedInputStream(pa.PythonFile(stream, "r"), "zstd")
            stream = io.BufferedReader(arrow, buffer_size=1 << 20)
        elif not isinstance(stream, io.BufferedReader):
            raise TypeError(f"{path}: expected a buffered stream")
        start = stream.peek(3)  # type: ignore[attr-defined]
        if not start:
            raise DataError(f"{path} is empty; remove it from the source or restore it")
        if encoding == "utf-8" and start.startswith(BOM):
            stream.read(3)
    return as_utf8(stream, encoding)


def open_seekable(path: Path) -> IO[bytes]:
    """Open ``path`` for formats that seek; a compressed one is unpacked to a temporary file."""
    stream = open_bytes(path)
    with path.open("rb") as raw:
        magic = raw.read(4)
    if not magic.startswith(tuple(COMPRESSIONS)):
        return stream
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (closed by the caller)
    with stream:
        shutil.copyfileobj(stream, unpacked)
    unpacked.seek(0)
    return unpacked


def detect_encoding(path: Path, wanted: str = "auto") -> str:
    """Return the encoding of the text in ``path``: ``wanted`` unless that is auto.

    A file is looked through up to its first characters beyond ASCII. The result of a file that
    has not changed is remembered in this process.

    Raises:
        DataError: ``wanted`` is no encoding, or the file is empty or unreadable.
    """
    if wanted != "auto":
        return check_encoding(wanted)
    with naming_the_file(path):
        stat = path.stat()
    return _detect_encoding(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _detect_encoding(path: Path, num_bytes: int, mtime_ns: int) -> str:
    with open_bytes(path) as stream, naming_the_file(path):
        sample = stream.read(SNIFF_BYTES)
        if sample.startswith(tuple(BINARY_MAGIC)):
            return "utf-8"
        num_read, last = len(sample), sample
        while sample.isascii() and b"\x00" not in sample and num_read < MAX_ASCII_BYTES:
            piece = stream.read(SNIFF_BYTES)
            if not piece:
                break
            num_read, last, sample = num_read + len(piece), piece, piece
        is_whole = len(last) < SNIFF_BYTES
    encoding = guess_encoding(sample, is_whole)
    if encoding != "utf-8":
        logger.info("%s: read as %s", path, encoding)
    return encoding


def detect_format(path: Path, wanted: str, encoding: str = "auto") -> str:
    """Return the format of ``path``: ``wanted`` unless that is auto, then content before name.

    Binary formats are told by their magic numbers; JSON by its first character, whatever the
    extension (``.txt`` excepted: a text may begin with a bracket); the rest by extension.

    Raises:
        DataError: when ``wanted`` is unknown or nothing tells the format.
    """
    if wanted not in ("auto", *FORMATS):
        raise DataError(
            f"format={wanted!r} is not one of auto, {', '.join(FORMATS)}{nearest(wanted, FORMATS)}"
        )
    if wanted != "auto":
        return wanted
    with open_bytes(path) as stream, naming_the_file(path):
        magic = stream.read(8)
    for start, name in BINARY_MAGIC.items():
        if magic.startswith(start):
            return name
    by_name = EXTENSIONS.get(_extension(path))
    if by_name in BINARY_FORMATS:
        raise DataError(f"{path} is named .{by_name} but has not that content; restore the file")
    with open_bytes(path, detect_encoding(path, encoding)) as stream, naming_the_file(path):
        text = stream.read(SNIFF_BYTES).lstrip()
    if by_name == "txt":
        return "txt"
    if text[:1] in (b"[", b"{"):
        return _json_kind(text, by_name)
    if by_name is None:
        raise DataError(
            f"{path}: neither name nor content tells the format; "
            f"set the source's format to one of {', '.join(FORMATS)}"
        )
    return by_name


def _json_kind(start: bytes, by_name: str | None) -> str:
    """Tell JSON Lines from one JSON value spread over the file."""
    if start.startswith(b"["):
        return "json"
    if by_name == "jsonl":
        return "jsonl"
    line, newline, _ = start.partition(b"\n")
    if not newline:
        return "jsonl"  # a single line, or one longer than what was looked at
    # An object over several lines opens with a line that is no whole object ("{" or '{"data": [').
    return "json" if line.rstrip().endswith((b"{", b"[", b",")) else "jsonl"
