"""From the shards of a source to its arrays, committed in one step."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile

import numpy as np

from trainer.data.encode import EncoderSpec, token_dtype
from trainer.data.prepared.drafts import ROW_ARRAYS
from trainer.data.prepared.fingerprints import SourcePlan
from trainer.data.prepared.shards import num_chunks, shard_path
from trainer.data.prepared.store import CONTENT_ARRAYS, DOCUMENT_ARRAYS, MANIFEST, STORE_FORMAT
from trainer.data.reading.records import Reject, RejectLog
from trainer.data.reading.remarks import Remarks
from trainer.data.storage import atomic_file, naming_the_disk
from trainer.disk import sync_path, unique_suffix
from trainer.errors import DataError

REJECTED = "rejected.jsonl"
NUM_REASONS = 10  # kept in the manifest, the most frequent ones

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
            sync_path(aside)
            aside.rename(plan.folder)
            sync_path(plan.folder.parent)
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
    dtypes: dict[str, np.dtype[Any]] = {"tokens": token_dtype(spec.num_ids)}
    dtypes |= CONTENT_ARRAYS[plan.content] | DOCUMENT_ARRAYS
    sizes = dict.fromkeys(dtypes, 0)
    sums = dict.fromkeys(DOCUMENT_ARRAYS, 0)
    for shard in _shards(plan):
        for name in sizes:
            sizes[name] += len(shard[name])
        for name in sums:
            sums[name] += int(shard[name].sum(dtype=np.uint64))
    if not sizes["num_tokens"]:
        _refuse_nothing(plan, counts, aside / REJECTED)
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
        **counts,
        "lengths": _describe_rows(plan),
        "vocab_size": spec.num_ids,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": spec.eos_token_id,
        "pad_token_id": spec.pad_token_id,
        "files": [[file.path.name, file.num_bytes, file.sha256] for file in plan.files],
        "arrays": arrays,
    }
    with atomic_file(aside / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=1, ensure_ascii=False).encode())


def _refuse_nothing(plan: SourcePlan, counts: dict[str, Any], rejected: Path) -> None:
    rows, chats = counts["rows"], counts["chats"]
    kept = plan.folder.with_name(f"{plan.folder.name}.{REJECTED}")
    shutil.copyfile(rejected, kept)
    if plan.content != "documents":
        left_out = f"{chats.get('long', 0)} longer than data.max_length"
    else:
        left_out = f"{rows['short']} shorter than data.min_chars={plan.min_chars}"
    reasons = "; ".join(f"{number} × {reason}" for reason, number in counts["reasons"][:3])
    raise DataError(
        f"source {plan.name!r}: none of {rows['read']} rows became a "
        f"{plan.content.removesuffix('s')} ({rows['rejected']} rejected, "
        f"{left_out}{': ' + reasons if reasons else ''}); the rows are listed in {kept}"
    )


def _describe_rows(plan: SourcePlan) -> dict[str, Any]:
    """Return how long the accepted rows are in tokens, before any were cut, and repetitions."""
    columns = {
        name: np.concatenate([np.empty(0, dtype), *(shard[name] for shard in _shards(plan))])
        for name, dtype in ROW_ARRAYS.items()
    }
    lengths = columns["row_lengths"].astype(np.int64)
    edges = 2 ** np.arange(4, 33, dtype=np.int64)  # up to 16 tokens, 32, 64, …
    bins = np.bincount(np.searchsorted(edges, lengths))
    return {
        "duplicates": len(lengths) - len(np.unique(columns["row_hashes"])),
        "median": int(np.percentile(lengths, 50)),
        "percentile_95": int(np.percentile(lengths, 95)),
        "longest": int(lengths.max()),
        "up_to": {str(edges[i]): int(number) for i, number in enumerate(bins)},
    }


def _join_rejects(plan: SourcePlan, max_bad_row_share: float, path: Path) -> dict[str, Any]:
    """Write all rows that were left out to one file, in order; check the share of bad ones.

    Returns:
        rows by fate, counts of conversations, remarks, and the most frequent reasons.
    """
    rows, chats, remarks = Counter(read=0, rejected=0, short=0), Counter[str](), Remarks()
    reasons: Counter[str] = Counter()
    samples: dict[str, str] = {}
    log = RejectLog(None, max_bad_row_share=1.0)
    with path.open("wb") as file:
        for shard in _shards(plan):
            counts = json.loads(shard["counts"].tobytes())
            rows.update(counts["rows"])
            chats.update(counts["chats"])
            remarks.merge(counts["remarks"])
            for name in ("rejected_rows", "left_out_rows"):
                lines = shard[name].tobytes()
                file.write(lines)
                for line in lines.splitlines():
                    reject = Reject(**json.loads(line))
                    alike = re.sub(r"\d+", "", reject.reason)  # they differ in numbers
                    samples.setdefault(alike, reject.reason)
                    reasons[alike] += 1
                    if name == "rejected_rows":
                        log.reject(reject)
    log.accept(rows["read"] - rows["rejected"])
    log.max_bad_row_share = max_bad_row_share
    # The user needs the list when the check fails and the folder of the merge goes away.
    log.path = plan.folder.with_name(f"{plan.folder.name}.{REJECTED}")
    if log.num_rejected:
        shutil.copyfile(path, log.path)
    log.check_share()
    log.path.unlink(missing_ok=True)
    return {
        "rows": dict(rows),
        "chats": dict(chats),
        "remarks": remarks.counts,
        "reasons": [[samples[alike], n] for alike, n in reasons.most_common(NUM_REASONS)],
    }


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
