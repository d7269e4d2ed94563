"""Batches of held-out documents, whose targets are each predicted exactly once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from trainer.config import DataConfig
from trainer.data.batches.collate import Batch, Row, batch_width, collate, split_sequences
from trainer.data.batches.pairs import read_pairs
from trainer.data.prepared.store import TokenStore
from trainer.errors import DataError


class EvalLoader:
    """One source's held-out documents, each token but a document's first predicted exactly once.

    A document longer than a row goes into windows that share one token, the context of the next
    window's first prediction. Every rank gets the same number of batches; rows without a target
    fill them up. ``sum of NLL / ln 2 / num_chars`` over all ranks is the bits per character.

    Args:
        store: the prepared sources.
        data_config: row length.
        source_name: whose held-out documents.
        max_chars: whole documents are taken, in the order of their text hash, up to this many
            characters (one at least): the same documents whatever the tokenizer.
        micro_batch_size: rows of a batch.
        rank: this rank.
        world_size: number of ranks.

    Raises:
        DataError: the source has no held-out document.
    """

    def __init__(
        self,
        store: TokenStore,
        data_config: DataConfig,
        source_name: str,
        *,
        max_chars: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._store, self._source = store, store.sources[source_name]
        self._source_id = list(store.sources).index(source_name)
        documents = self._source.document_ids(held_out=True)
        if not len(documents):
            raise DataError(
                f"source {source_name!r} has no held-out document (holdout_share="
                f"{self._source.holdout_share:g} of {len(self._source.text_hashes)} documents); "
                f"raise data.sources.{source_name}.holdout_share"
            )
        documents = documents[np.argsort(self._source.text_hashes[documents], kind="stable")]
        chars = np.cumsum(self._source.num_chars[documents], dtype=np.int64)
        taken = max(1, int(np.searchsorted(chars, max_chars, side="right")))
        self.documents = documents[:taken]
        lengths = np.diff(self._source.offsets)[self.documents]
        self.num_chars = int(self._source.num_chars[self.documents].sum(dtype=np.int64))
        self.num_bytes = int(self._source.num_bytes[self.documents].sum(dtype=np.int64))
        self.num_targets = int((lengths - 1).sum())
        if self._source.weights is not None:
            self.num_targets = sum(int((self._weights(i)[1:] > 0).sum()) for i in self.documents)
        self.micro_batch_size, self.rank, self.world_size = micro_batch_size, rank, world_size
        self._max_length = data_config.max_length
        self._of_pairs = self._source.first_lengths is not None
        self._isolate = self._of_pairs and data_config.packing  # both sequences in one row
        self._windows = self._cut(lengths, self._max_length)
        self.num_batches = -(-len(self._windows) // (micro_batch_size * world_size))

    def _cut(self, lengths: np.ndarray, max_length: int) -> list[tuple[int, int, int]]:
        """Return (document, start, stop) of every window, the longest first."""
        windows = []
        for document, length in zip(self.documents.tolist(), lengths.tolist(), strict=True):
            for start in range(0, max(1, length - 1), max_length - 1):
                windows.append((document, start, min(start + max_length, length)))
        return sorted(windows, key=lambda window: window[1] - window[2])

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches, as many as every other rank yields."""
        for index in range(self.num_batches):
            start = (index * self.world_size + self.rank) * self.micro_batch_size
            rows = [self._row(i) for i in range(start, start + self.micro_batch_size)]
            if self._of_pairs and not self._isolate:
                rows = [sequence for row in rows for sequence in split_sequences(row)]
            pad = self._store.pad_token_id
            width = batch_width(rows, self._max_length)
            yield collate(rows, length=width, pad_token_id=pad, isolate=self._isolate)

    def _row(self, index: int) -> Row:
        if index >= len(self._windows):
            return Row([], -1, self._source_id, examples=[] if self._of_pairs else None)
        document, start, stop = self._windows[index]
        if self._of_pairs:
            return read_pairs(self._source, [document], index, self._source_id)
        pieces = [self._source.document(document)[start:stop]]
        if self._source.weights is None:
            return Row(pieces, index, self._source_id)
        return Row(pieces, index, self._source_id, [self._weights(document)[start:stop]])

    def _weights(self, document: int) -> NDArray[np.float32]:
        """Return 1 for each trained token: figures per character know no heavier ones."""
        own = self._source.document_weights(document)
        assert own is not None
        return (own > 0).astype(np.float32)
