"""Rewrite a safetensors file with some tensors given other rows, streaming all others.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian length of the
header, the header as JSON (name → dtype, shape, data_offsets), then the data.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.errors import ConfigError, DataError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
COPY_BYTES = 1 << 24

Progress = Callable[[int], None]  # called with the number of bytes written
# From a tensor's name and its map [rows, ...] to its new values, in chunks of rows.
NewValues = Callable[[str, Tensor], Iterable[Tensor]]


def open_tensors(path: Path) -> safe_open:
    """Open a safetensors file to read tensors by name.

    Raises:
        DataError: it is truncated, damaged or none.
    """
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path} cannot be read: {error}; it may be truncated or damaged: copy it again"
        ) from error


def rewrite_shard(
    source: Path,
    target: Path,
    header: dict[str, Any],
    resized: set[str],
    num_rows: int,
    new_values: NewValues,
    progress: Progress,
) -> int:
    """Copy a safetensors file, giving the tensors ``resized`` another number of rows.

    Args:
        source: the file to read.
        target: the file to write.
        header: of ``source``, as ``safetensors_header`` gives it.
        resized: names; those not in the file are ignored.
        num_rows: first dimension of the resized tensors.
        new_values: gives the resized tensors' values, ``num_rows`` rows in all.
        progress: called with the number of bytes written.

    Returns:
        The bytes of tensor data the file grew by.

    Raises:
        ConfigError: a tensor to resize is stored in a dtype without arithmetic.
    """
    if not resized & set(header):
        shutil.copyfile(source, target)
        progress(source.stat().st_size)
        return 0
    order = sorted(header, key=lambda name: header[name]["data_offsets"][0])
    new_header = _plan(header, order, resized, num_rows)
    with source.open("rb") as reader, target.open("wb") as writer:
        data_start = _write_header(reader, writer, new_header)
        for name in order:
            start, stop = (data_start + offset for offset in header[name]["data_offsets"])
            if name not in resized:
                _copy_range(reader, writer, start, stop, progress)
                continue
            for rows in new_values(name, map_tensor(source, start, name, header[name])):
                data = rows.contiguous().view(torch.uint8).numpy()
                writer.write(data.data)
                progress(data.nbytes)
    return _data_bytes(new_header) - _data_bytes(header)


def map_tensor(source: Path, start: int, name: str, entry: dict[str, Any]) -> Tensor:
    """Map a tensor of a safetensors file into memory (copy on write): pages load as they are read.

    Raises:
        ConfigError: the dtype has no arithmetic (8-bit and integer formats).
    """
    if entry["dtype"] not in DTYPES:
        raise ConfigError(
            f"{source}: {name} is stored as {entry['dtype']}; its rows can be computed only in "
            f"{', '.join(DTYPES)}; give an unquantised model"
        )
    size = entry["data_offsets"][1] - entry["data_offsets"][0]
    raw = np.memmap(source, dtype=np.uint8, mode="c", offset=start, shape=(size,))
    return torch.from_numpy(raw).view(DTYPES[entry["dtype"]]).view(entry["shape"])


def _plan(
    header: dict[str, Any], order: list[str], resized: set[str], num_rows: int
) -> dict[str, Any]:
    """Return the header of the new file: same order, other shapes and offsets."""
    planned: dict[str, Any] = {}
    end = 0
    for name in order:
        entry = header[name]
        shape = list(entry["shape"])
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        if name in resized:
            size, shape[0] = size // shape[0] * num_rows, num_rows
        planned[name] = {**entry, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return planned


def _data_bytes(header: dict[str, Any]) -> int:
    return max(int(entry["data_offsets"][1]) for entry in header.values())


def _write_header(reader: BinaryIO, writer: BinaryIO, tensors: dict[str, Any]) -> int:
    """Write the new header with the old file's metadata; return where the old data starts."""
    length = int.from_bytes(reader.read(8), "little")
    old = json.loads(reader.read(length))
    metadata = {"__metadata__": old["__metadata__"]} if "__metadata__" in old else {}
    text = json.dumps({**metadata, **tensors}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    writer.write(len(text).to_bytes(8, "little") + text)
    return 8 + length


def _copy_range(
    reader: BinaryIO, writer: BinaryIO, start: int, stop: int, progress: Progress
) -> None:
    reader.seek(start)
    while start < stop:
        data = reader.read(min(COPY_BYTES, stop - start))
        if not data:
            raise ConfigError(f"{reader.name} ends before its header says; copy it again")
        writer.write(data)
        start += len(data)
        progress(len(data))
