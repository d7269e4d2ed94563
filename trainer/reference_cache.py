"""Reference log-probabilities on disk: computed once by the policy before its first step.

``STORE/reference/SOURCE-KEY/logps.npy`` holds one row a document, ``manifest.json`` what it is of;
the manifest is written last, so a folder that has one is complete. The work is cut into parts that
are written in one step each: after a kill only what is missing is computed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from trainer.data.batches.bins import fill_bins
from trainer.data.batches.collate import Batch, Row, batch_width, collate, split_sequences
from trainer.data.batches.mismatched import MismatchedAnswers
from trainer.data.batches.pairs import read_pairs
from trainer.data.prepared.store import MANIFEST, SourceStore
from trainer.data.storage import atomic_file, naming_the_disk, write_atomically
from trainer.disk import hash_file
from trainer.engine.collectives import any_over_ranks, barrier, max_over_ranks
from trainer.errors import DataError
from trainer.sequence_logps import TokenLogps, sum_over_sequences

FORMAT = "kuroshio-reference-1"
LOGPS = "logps.npy"
COLUMNS = {1: 0, -1: 1, 0: 2}  # of an example's side: chosen, rejected, mismatched
MAX_PARTS, MIN_PART_ROWS = 256, 8
# By how much a token's log-probability may differ between two machines or packings (nats).
TOLERANCES = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}


@dataclass(frozen=True)
class Job:
    """How a source's documents go through the model.

    Attributes:
        source: of preferences.
        pad_token_id: any valid id.
        max_length: tokens a row.
        packing: False gives each sequence a row of its own.
        micro_batch_size: rows of one forward pass.
        mismatched: makes KTO's third sequence of a document; None for other losses.
    """

    source: SourceStore
    pad_token_id: int
    max_length: int
    packing: bool
    micro_batch_size: int
    mismatched: MismatchedAnswers | None

    @property
    def num_columns(self) -> int:
        """Sequences of a document: chosen, rejected, perhaps mismatched."""
        return 2 if self.mismatched is None else 3

    def parts(self) -> list[list[NDArray[np.int64]]]:
        """Return the documents of each row of each part; a function of the source alone."""
        lengths = np.diff(self.source.offsets)
        order = np.argsort(-lengths, kind="stable")
        bins = fill_bins(lengths, self.max_length)
        rows = [order[bins[number]] for number in range(len(bins))]
        size = max(MIN_PART_ROWS, -(-len(rows) // MAX_PARTS))
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def batches(self, rows: Sequence[NDArray[np.int64]]) -> Iterator[Batch]:
        """Yield what goes through the model for some rows of documents."""
        for start in range(0, len(rows), self.micro_batch_size):
            documents = [row.tolist() for row in rows[start : start + self.micro_batch_size]]
            pairs = [
                read_pairs(self.source, row, number, 0) for number, row in enumerate(documents)
            ]
            yield self._collate(pairs)
            if self.mismatched is not None:
                yield self.mismatched.read([(0, number) for row in documents for number in row])

    def filler(self) -> Batch:
        """Return a batch without examples, for a rank that has nothing left to do."""
        return self._collate([Row([], -1, 0, examples=[])])

    def _collate(self, rows: list[Row]) -> Batch:
        if not self.packing:
            rows = [sequence for row in rows for sequence in split_sequences(row)]
        width = batch_width(rows, self.max_length)
        return collate(rows, length=width, pad_token_id=self.pad_token_id, isolate=self.packing)


class ReferenceCache:
    """One source's reference log-probabilities, in its folder.

    Args:
        store_dir: the run's ``data.store_dir``.
        job: how the source goes through the model.
        identity: everything beside the source that changes the numbers.
    """

    def __init__(self, store_dir: Path, job: Job, identity: Mapping[str, Any]) -> None:
        source = job.source
        self.job = job
        self.identity = {
            "format": FORMAT,
            **identity,
            "source": source.folder.name,
            "num_documents": len(source.text_hashes),
            "num_columns": job.num_columns,
        }
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        self.folder = store_dir.expanduser() / "reference" / f"{source.name}-{key[:16]}"

    def is_complete(self) -> bool:
        """Return whether the numbers are there."""
        return (self.folder / MANIFEST).exists()

    def open(self) -> NDArray[np.float32]:
        """Return the numbers, memory-mapped; NaN where no sequence is. -> [documents, columns]

        Raises:
            DataError: they are damaged, or belong to other rows or another model.
        """
        remedy = f"delete {self.folder}, and the next run computes it again"
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{self.folder / MANIFEST} is damaged: {error}; {remedy}") from error
        found = manifest.get("identity", {})
        changed = [key for key in self.identity if found.get(key) != self.identity[key]]
        if changed:
            raise DataError(
                f"the reference log-probabilities in {self.folder} belong to other rows or another "
                f"model: {', '.join(changed)} differ from this run's; {remedy}"
            )
        path = self.folder / LOGPS
        if not path.exists() or hash_file(path) != manifest["sha256"]:
            raise DataError(f"{path} is damaged: its SHA-256 is not its manifest's; {remedy}")
        table: NDArray[np.float32] = np.load(path, mmap_mode="r")
        return table

    def check(self, token_logps: TokenLogps, device: torch.device, precision: str) -> None:
        """Compute one micro-batch again: what the key does not know of would show here.

        Raises:
            DataError: the numbers are not this model's.
        """
        table, batch = self.open(), next(self.job.batches(self.job.parts()[0]))
        now = sum_over_sequences(batch, token_logps, device)
        documents, columns = _places(batch)
        difference = (now.sums.cpu() - torch.from_numpy(table[documents, columns])).abs()
        worst = float((difference / now.lengths.cpu()).max())
        if any_over_ranks(not worst <= TOLERANCES[precision]):
            raise DataError(
                f"the reference log-probabilities in {self.folder} are not those of this model: "
                f"{worst:.3g} nats a token apart; delete the folder, and the next run computes it "
                "again"
            )

    def compute(
        self, token_logps: TokenLogps, device: torch.device, rank: int, world_size: int
    ) -> None:
        """Compute what is missing, on all ranks together.

        All take the same number of forward passes, which ZeRO-3 needs.
        """
        parts, filler = self.job.parts(), self.job.filler()
        # Agreed on: another run may be writing parts, and ranks need not see them at one time.
        absent = max_over_ranks([not self._part(n).exists() for n in range(len(parts))])
        missing = [n for n, is_absent in enumerate(absent) if is_absent]
        per_row = 1 if self.job.mismatched is None else 2
        num_passes = per_row * -(-max(map(len, parts)) // self.job.micro_batch_size)
        table = self._empty_table()
        with _progress(rank) as progress:
            for first in progress.track(
                range(0, len(missing), world_size), description=f"reference {self.job.source.name}"
            ):
                own = missing[first + rank : first + rank + 1]
                batches = [batch for n in own for batch in self.job.batches(parts[n])]
                for number in range(num_passes):
                    batch = batches[number] if number < len(batches) else filler
                    logps = sum_over_sequences(batch, token_logps, device).sums
                    table[_places(batch)] = logps.cpu().numpy()
                for n in own:
                    self._write_part(n, table[np.concatenate(parts[n])])
        barrier()
        if rank == 0:
            self._commit(parts)
        barrier()

    def _empty_table(self) -> NDArray[np.float32]:
        shape = len(self.job.source.text_hashes), self.job.num_columns
        return np.full(shape, np.nan, np.float32)

    def _part(self, number: int) -> Path:
        return self.folder / "parts" / f"{number:05d}.npy"

    def _write_part(self, number: int, values: NDArray[Any]) -> None:
        path = self._part(number)
        with naming_the_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            np.save(file, values)

    def _commit(self, parts: list[list[NDArray[np.int64]]]) -> None:
        """Join the parts; another run that shares the store may have done so meanwhile."""
        if self.is_complete():
            return
        table = self._empty_table()
        for number, rows in enumerate(parts):
            table[np.concatenate(rows)] = np.load(self._part(number))
        with atomic_file(self.folder / LOGPS) as file:
            np.save(file, table)
        manifest = {"identity": self.identity, "sha256": hash_file(self.folder / LOGPS)}
        text = json.dumps(manifest, ensure_ascii=False, indent=1)
        write_atomically(self.folder / MANIFEST, text.encode())
        shutil.rmtree(self.folder / "parts", ignore_errors=True)


def _places(batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return document and column of each example of a batch."""
    assert batch.examples is not None
    columns = [COLUMNS[side] for side in batch.examples.sides.tolist()]
    return batch.examples.documents.numpy(), np.array(columns, np.int64)


def _progress(rank: int) -> Progress:
    """Return a bar that shows on rank 0's terminal."""
    console = Console(stderr=True)
    return Progress(console=console, disable=rank != 0 or not console.is_terminal)
