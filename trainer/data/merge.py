"""From the shards of a source to its arrays, committed in one step."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile

import numpy as np

from trainer.data.encode import EncoderSpec, token_dtype
from trainer.data.fingerprints import SourcePlan
from trainer.data.records import Reject, RejectLog
from trainer.data.shards import num_chunks, shard_path
from trainer.data.storage import atomic_file, naming_the_disk, sync_folder, unique_suffix
from trainer.data.store import DOCUMENT_ARRAYS, MANIFEST, STORE_FORMAT
from trainer.errors import DataError

REJECTED = "rejected.jsonl"

logger = logging.getLogger(__name__)


def commit_source(plan: SourcePlan, spec: EncoderSpec, max_bad_row_share: float) -> None:
    """Join a source's shards, check them, and give the result its name.

    Nothing happens when another job has committed the source meanwhile.

    Raises:
        DataError: too many rejected rows, no document at all, or a damaged shard.
        StorageError: the disk is full; the shards are kept.
    """
    committed = plan.folder / MANIFEST
    aside = plan.work_folder / f"merge-{unique_suffix()}"
    try:
        if committed.exists():
            return
        with naming_the_disk(aside):
            aside.mkdir()
            _join(plan, spec, max_bad_row_share, aside)
            sync_folder(aside)
            aside.rename(plan.folder)
            sync_folder(plan.folder.parent)
    except OSError:
        # Renaming onto a folder with files in it fails, and so does any step after another job's
        # clean-up: both mean that the source is there.
        if not committed.exists():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if committed.exists():
            _clear(plan.work_folder)


def _clear(work_folder: Path) -> None:
    """Take the shards out of sight in one step, then delete them."""
    hidden = work_folder.with_name(f".{work_folder.name}.{unique_suffix()}")
    try:
        work_folder.rename(hidden)
    except FileNotFoundError:
        return  # another job did it
    # A job that lost the race may be deleting its part of it at the same time.
    shutil.rmtree(hidden, ignore_errors=True)
    if hidden.exists():  # such as a file that NFS keeps because another process has it open
        logger.warning("%s is no longer needed, but part of it cannot be deleted now", hidden)


def _join(plan: SourcePlan, spec: EncoderSpec, max_bad_row_share: float, aside: Path) -> None:
    counts = _join_rejects(plan, max_bad_row_share, aside / REJECTED)
    sizes = dict.fromkeys(("tokens", *DOCUMENT_ARRAYS), 0)
    sums = dict.fromkeys(DOCUMENT_ARRAYS, 0)
    for shard in _shards(plan):
        for name in sizes:
            sizes[name] += len(shard[name])
        for name in sums:
            sums[name] += int(shard[name].sum(dtype=np.uint64))
    if not sizes["num_tokens"]:
        raise DataError(
            f"source {plan.name!r}: none of {counts['read']} rows became a document "
            f"({counts['rejected']} rejected, {counts['short']} shorter than data.min_chars="
            f"{plan.min_chars}); see {plan.work_folder}"
        )
    dtypes: dict[str, np.dtype[Any]] = {"tokens": token_dtype(spec.num_ids), **DOCUMENT_ARRAYS}
    arrays = {
        name: _write_array(aside / f"{name}.npy", plan, name, dtypes[name], size)
        for name, size in sizes.items()
    }
    manifest = {
        "format": STORE_FORMAT,
        "source": plan.name,
        "key": plan.key,
        "num_documents": sizes["num_tokens"],
        **{name: sums[name] for name in ("num_tokens", "num_chars", "num_bytes")},
        "rows": counts,
        "vocab_size": spec.num_ids,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": spec.eos_token_id,
        "pad_token_id": spec.pad_token_id,
        "files": [[file.path.name, file.num_bytes, file.sha256] for file in plan.files],
        "arrays": arrays,
    }
    with atomic_file(aside / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=1, ensure_ascii=False).encode())


def _join_rejects(plan: SourcePlan, max_bad_row_share: float, path: Path) -> dict[str, int]:
    """Write all rejected rows to one file, in order; check their share of the source."""
    total = {"read": 0, "rejected": 0, "short": 0}
    log = RejectLog(None, max_bad_row_share=1.0)
    with path.open("wb") as file:
        for shard in _shards(plan):
            for name, count in json.loads(shard["counts"].tobytes()).items():
                total[name] += count
            rows = shard["rejected_rows"].tobytes()
            file.write(rows)
            for line in rows.splitlines():
                log.reject(Reject(**json.loads(line)))
    log.accept(total["read"] - total["rejected"])
    log.max_bad_row_share = max_bad_row_share
    # The user needs the list when the check fails and the folder of the merge goes away.
    log.path = plan.folder.with_name(f"{plan.folder.name}.{REJECTED}")
    if log.num_rejected:
        shutil.copyfile(path, log.path)
    log.check_share()
    log.path.unlink(missing_ok=True)
    return total


def _shards(plan: SourcePlan) -> Iterator[Any]:
    for file_id, file in enumerate(plan.files):
        for chunk in range(num_chunks(plan.work_folder, file_id)):
            path = shard_path(plan.work_folder, file_id, chunk)
            try:
                with np.load(path) as shard:
                    yield shard
            except (BadZipFile, ValueError, EOFError) as error:
                raise DataError(
                    f"shard {path} of {file.path} is damaged: {error}; delete it and run "
                    "`kuroshio prepare` again"
                ) from error


def _write_array(
    path: Path, plan: SourcePlan, name: str, dtype: np.dtype[Any], size: int
) -> dict[str, Any]:
    """Write one array of all shards as ``.npy``; return its size and hash."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": dtype.str, "fortran_order": False, "shape": (size,)}
    )
    digest = hashlib.sha256()

    def write(file: IO[bytes], content: bytes) -> None:
        digest.update(content)
        file.write(content)

    with atomic_file(path) as file:
        write(file, header.getvalue())
        for shard in _shards(plan):
            write(file, shard[name].tobytes())
        num_bytes = file.tell()
    return {"bytes": num_bytes, "sha256": digest.hexdigest()}
