"""The work of one process while a source is prepared: chunks of a file to shards of tokens.

A chunk is a fixed stretch of a file's rows, whoever works on it and with how many others. Each
becomes one shard, written in one step; a shard that is there is never made again. So a killed
preparation goes on where it was, and two started at once can only do the same work twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.data.chats.conversations import walk_conversations
from trainer.data.encode import Encoder
from trainer.data.prepared.drafts import Draft, start_draft
from trainer.data.prepared.fingerprints import SourceFile, SourcePlan
from trainer.data.prepared.store import MANIFEST, hash_text
from trainer.data.reading.readers import decode_row, walk_file
from trainer.data.reading.records import RejectLog
from trainer.data.reading.rows import Row
from trainer.data.storage import atomic_file

if TYPE_CHECKING:
    from trainer.data.chats.chat_encoder import ChatEncoder

CHUNKS_PER_FILE = 64  # enough to spread a file over a node's processes
MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 1 << 20, 1 << 26
ENCODE_CHARS = 1 << 18  # texts handed to the tokenizer at a time

Report = Callable[[int, int], None]  # bytes read, documents made since the last call


@dataclass(frozen=True)
class Task:
    """Every ``num_parts``-th chunk of a file, from chunk ``part`` on."""

    plan: SourcePlan
    file_id: int
    part: int
    num_parts: int
    max_bad_row_share: float

    @property
    def file(self) -> SourceFile:
        """The file to read."""
        return self.plan.files[self.file_id]


def chunk_bytes(file: SourceFile) -> int:
    """Return the size of a file's chunks in bytes of raw rows."""
    return min(max(file.num_bytes // CHUNKS_PER_FILE, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)


def shard_path(work_folder: Path, file_id: int, chunk: int) -> Path:
    """Return where a chunk's shard belongs."""
    return work_folder / f"{file_id:06d}-{chunk:06d}.npz"


def count_path(work_folder: Path, file_id: int) -> Path:
    """Return where the number of a file's chunks is kept once it is known."""
    return work_folder / f"{file_id:06d}.chunks"


def num_chunks(work_folder: Path, file_id: int) -> int:
    """Return the number of chunks of a file.

    Raises:
        FileNotFoundError: it was not read to its end yet.
    """
    return int(count_path(work_folder, file_id).read_text())


def run_task(task: Task, encoder: Encoder | ChatEncoder, report: Report) -> None:
    """Make the missing shards of a task.

    Raises:
        DataError: the file is unreadable or has too many bad rows.
        StorageError: the disk is full.
    """
    work_folder, committed = task.plan.work_folder, task.plan.folder / MANIFEST
    if _is_done(task):
        return
    chunk = -1
    try:
        for chunk, rows in enumerate(_chunks(task)):
            shard = shard_path(work_folder, task.file_id, chunk)
            if committed.exists():
                return  # another job was faster
            if chunk % task.num_parts == task.part and not shard.exists():
                _write_shard(task, shard, rows, encoder, report)
        with atomic_file(count_path(work_folder, task.file_id)) as file:
            file.write(str(chunk + 1).encode())
    except FileNotFoundError:
        if not committed.exists():  # else another job has finished the source and cleaned up
            raise


def _is_done(task: Task) -> bool:
    """Tell whether every shard of a task is there, so that its file need not be read at all."""
    folder = task.plan.work_folder
    try:
        chunks = range(task.part, num_chunks(folder, task.file_id), task.num_parts)
    except FileNotFoundError:
        return False
    return all(shard_path(folder, task.file_id, chunk).exists() for chunk in chunks)


def _chunks(task: Task) -> Iterator[Iterator[Row]]:
    """Yield the chunks of a file; rows of a chunk that was not read are passed over."""
    file, source = task.file, task.plan.source
    if file.layout is None:
        rows = walk_file(file.path, source)
    else:
        rows = walk_conversations(file.path, source, file.layout)
    limit = chunk_bytes(task.file)
    following = next(rows, None)
    while following is not None:
        first = following

        def chunk(first: Row = first) -> Iterator[Row]:
            nonlocal following
            row: Row | None = first
            num_bytes = 0
            while row is not None and num_bytes < limit:
                num_bytes += row.num_bytes
                yield row
                row = next(rows, None)
            following = row

        current = chunk()
        yield current
        for _ in current:
            pass


def _write_shard(
    task: Task, path: Path, rows: Iterator[Row], encoder: Encoder | ChatEncoder, report: Report
) -> None:
    draft, rejects = start_draft(path, task.max_bad_row_share)
    layout = task.file.layout
    if isinstance(encoder, Encoder):
        _add_documents(draft, rows, task, encoder, rejects, report)
    elif layout is not None:
        # Here, since texts need none of what templates need.
        from trainer.data.prepared.chat_shards import add_chats

        add_chats(draft, rows, task.file.path, layout, encoder, rejects, report)
    draft.write(path, rejects, encoder.dtype)


def _add_documents(
    draft: Draft,
    rows: Iterator[Row],
    task: Task,
    encoder: Encoder,
    rejects: RejectLog,
    report: Report,
) -> None:
    for texts in _batches(rows, task, rejects, report):
        kept = [text for text in texts if len(text) >= task.plan.min_chars]
        draft.short += len(texts) - len(kept)
        for text, ids in zip(kept, encoder.encode(kept), strict=True):
            encoded, num_tokens = text.encode(), len(ids) // encoder.dtype.itemsize
            digest = hash_text(encoded)
            draft.tokens.append(ids)
            draft.add(
                num_tokens=num_tokens,
                num_chars=len(text),
                num_bytes=len(encoded),
                text_hashes=digest,
                row_lengths=num_tokens,
                row_hashes=digest,
            )


def _batches(
    rows: Iterator[Row], task: Task, rejects: RejectLog, report: Report
) -> Iterator[list[str]]:
    """Yield the texts of the good rows, some at a time."""
    texts: list[str] = []
    num_chars = num_bytes = 0
    for row in rows:
        num_bytes += row.num_bytes
        text = decode_row(row, task.file.path, task.plan.source, rejects)
        if text is not None:
            texts.append(text)
            num_chars += len(text)
        if num_chars >= ENCODE_CHARS:
            yield texts
            report(num_bytes, len(texts))
            texts, num_chars, num_bytes = [], 0, 0
    if texts:
        yield texts
    report(num_bytes, len(texts))
