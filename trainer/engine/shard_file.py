"""Files of a checkpoint, written and hashed in one pass, on the disk before anybody counts them.

A shard is a plain safetensors file of 1-D fp32 tensors, written block by block: neither the whole
of it nor a copy of what is in it has to be in memory.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch

Layout = list[tuple[str, int]]  # key and number of elements of each tensor, in the file's order
BLOCK_BYTES = 8 << 20  # hashed and written at once: large for a file system, small for a cache


def shard_header(layout: Layout) -> bytes:
    """Return what stands before the tensors: a length, and their places as JSON.

    The format is that of https://huggingface.co/docs/safetensors: 8 bytes of length, little
    endian; JSON, padded with spaces to a multiple of 8; the tensors one after another.
    """
    entries, end = {}, 0
    for key, numel in layout:
        begin, end = end, end + 4 * numel
        entries[key] = {"dtype": "F32", "shape": [numel], "data_offsets": [begin, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous fp32 tensor on the host, little-endian as the format is.

    Raises:
        ValueError: on a machine of the other byte order.
    """
    if sys.byteorder != "little":
        raise ValueError("safetensors files are little-endian, this machine is not")
    return memoryview(tensor.detach().numpy()).cast("B")


def write_shard(
    path: Path, layout: Layout, tensors: Iterable[torch.Tensor], *, sync: bool = True
) -> dict[str, Any]:
    """Write tensors [numel], fp32, on the host, in the order of ``layout``.

    Args:
        path: a new file.
        layout: of the file.
        tensors: which, put one after another, are those of ``layout``; cut as they like.
        sync: whether it has to outlive a loss of power.

    Returns:
        Its ``bytes`` and ``sha256``.

    Raises:
        OSError: it was not written.
        ValueError: the tensors are not as long as ``layout`` says.
    """
    header = shard_header(layout)
    facts = write_blocks(path, _chain(header, tensors), sync=sync)
    expected = len(header) + 4 * sum(numel for _, numel in layout)
    if facts["bytes"] != expected:
        raise ValueError(f"{path} has {facts['bytes']} bytes, its layout {expected}")
    return facts


def _chain(header: bytes, tensors: Iterable[torch.Tensor]) -> Iterator[memoryview]:
    yield memoryview(header)
    yield from map(tensor_bytes, tensors)


def copy_durably(source: Path, target: Path) -> dict[str, Any]:
    """Copy a file; return the ``bytes`` and ``sha256`` of what was read and written."""
    with source.open("rb", buffering=0) as file:
        return write_blocks(target, _read_blocks(file))


def _read_blocks(file: Any) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(BLOCK_BYTES))
    while size := file.readinto(buffer):
        yield buffer[:size]


def write_blocks(path: Path, pieces: Iterable[memoryview], *, sync: bool = True) -> dict[str, Any]:
    """Write a new file and, with ``sync``, to the disk; return its ``bytes`` and ``sha256``.

    A block is hashed while it is written and the next one is gathered. What has to be on the disk
    anyway goes there past the page cache: that would cost a copy, and memory that training lacks.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1, "hash") as hasher:
        if sync:
            _bypass_cache(file, True)
        hashed: Future[None] | None = None
        for block in _gather(pieces):
            if hashed:
                hashed.result()
            hashed = hasher.submit(digest.update, block)
            _write_all(file, block)
            size += len(block)
        if hashed:
            hashed.result()
        if sync:
            os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _gather(pieces: Iterable[memoryview]) -> Iterator[memoryview]:
    """Yield blocks, each valid until the next but one is asked for; all but the last are full.

    They begin at a page of memory, as files without a page cache need it.
    """
    blocks = itertools.cycle([memoryview(mmap.mmap(-1, BLOCK_BYTES)) for _ in range(2)])
    block, filled = next(blocks), 0
    for piece in pieces:
        while len(piece):
            part = piece[: BLOCK_BYTES - filled]
            block[filled : filled + len(part)] = part
            piece, filled = piece[len(part) :], filled + len(part)
            if filled == BLOCK_BYTES:
                yield block
                block, filled = next(blocks), 0
    if filled:
        yield block[:filled]


def _write_all(file: BinaryIO, piece: memoryview) -> None:
    while len(piece):
        if len(piece) % mmap.PAGESIZE:  # the end of a file, or what a short write left
            _bypass_cache(file, False)
        try:
            piece = piece[file.write(piece) :]
        except OSError as error:
            if error.errno != errno.EINVAL or not _bypass_cache(file, False):
                raise


def _bypass_cache(file: BinaryIO, wanted: bool) -> bool:
    """Have a file written past the page cache, or not; return whether that changed anything.

    Some file systems (tmpfs, older FUSE) know only the cache, and some devices larger pages.
    """
    now = fcntl.fcntl(file, fcntl.F_GETFL)
    flags = now | os.O_DIRECT if wanted else now & ~os.O_DIRECT
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return flags != now


def write_json(path: Path, data: Any, *, sync: bool = True) -> None:
    """Write JSON whole: aside, to the disk with ``sync``, renamed."""
    aside = path.with_name(f".{path.name}.tmp")
    text = json.dumps(data, ensure_ascii=False, indent=1)
    write_blocks(aside, [memoryview(text.encode())], sync=sync)
    aside.rename(path)
