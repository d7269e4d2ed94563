"""Batches for training and evaluation, computed from row numbers alone.

The content of a row hangs on the seed and the row's number, never on ranks, accumulation or
micro-batch size. So the whole state of a training loader is one integer. Rows of uneven length are
dealt within their optimizer step by length, so that all ranks pad little and finish together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.config import DataConfig
from trainer.data.collate import Batch, Row, collate
from trainer.data.mixture import Mixture
from trainer.data.pack import Packer, Piece, Rows, WholePacker
from trainer.data.store import SourceStore, TokenStore
from trainer.errors import ConfigError, DataError

# A batch's width is a multiple of this: tensor cores want 8, and a CPU's bf16 matmul keeps code for
# every shape it has met, half a gigabyte for a few hundred of them.
WIDTH_UNIT = 8
PREFETCH_BATCHES = 2  # hides the page faults of a store on a network file system


class DrawnRow(NamedTuple):
    """A row of the run: which it is and what it holds."""

    number: int
    source_id: int
    pieces: list[Piece]

    @property
    def length(self) -> int:
        """Tokens in it."""
        return sum(piece.stop - piece.start for piece in self.pieces)


def make_rows(store: TokenStore, data: DataConfig, seed: int) -> dict[str, Rows]:
    """Return the stream of training rows of every source."""
    return {name: _rows_of(source, name, data, seed) for name, source in store.sources.items()}


def _rows_of(source: SourceStore, name: str, data: DataConfig, seed: int) -> Rows:
    documents = source.document_ids(held_out=False)
    lengths = np.diff(source.offsets)[documents]
    key = f"{seed}/{name}"
    if data.content == "conversations" and data.packing:
        return WholePacker(documents, lengths, max_length=data.max_length, seed_key=key)
    return Packer(
        documents, lengths, max_length=data.max_length, packing=data.packing, seed_key=key
    )


def make_mixture(rows: Mapping[str, Rows], data: DataConfig, seed: int) -> Mixture:
    """Return which source each row of a run comes from.

    Raises:
        DataError: no source has rows to train on.
    """
    weights = {name: data.sources[name].weight for name in rows}
    rows_per_epoch = {name: own.rows_per_epoch for name, own in rows.items()}
    return Mixture(weights, rows_per_epoch, seed, by_pass=data.weights_are == "epochs")


def batch_width(rows: Sequence[Row], max_length: int) -> int:
    """Return the width of a batch: its longest row's, rounded up, at most ``max_length``."""
    longest = max(2, *(sum(map(len, row.pieces)) for row in rows))
    return min(-(-longest // WIDTH_UNIT) * WIDTH_UNIT, max_length)


class TrainLoader:
    """An endless iterator over one rank's micro-batches.

    Step k takes the global rows ``k * rows_per_step .. (k + 1) * rows_per_step - 1``, the longest
    first where lengths differ; its a-th micro-batches take the next ``world_size *
    micro_batch_size`` of them, in the order of ranks.

    Args:
        store: the prepared sources.
        data_config: mixture weights, row length and packing.
        seed: decides mixture and document order.
        rows_per_step: rows of one optimizer step over all ranks.
        micro_batch_size: rows of one batch.
        rank: this rank.
        world_size: number of ranks.
        start_row: ``state()["next_row"]`` of the run to go on with.

    Raises:
        ConfigError: ``rows_per_step`` does not divide over the ranks, or ``start_row`` is not the
            start of a step.
        DataError: no source has rows to train on.
    """

    def __init__(
        self,
        store: TokenStore,
        data_config: DataConfig,
        *,
        seed: int,
        rows_per_step: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        start_row: int = 0,
    ) -> None:
        unit = micro_batch_size * world_size
        if rows_per_step % unit:
            raise ConfigError(
                f"{rows_per_step} rows a step do not divide over micro_batch_size*world_size={unit}"
                f"; use {max(1, rows_per_step // unit) * unit} rows"
            )
        if start_row % rows_per_step:
            raise ConfigError(
                f"the loader's next_row={start_row} is not the start of a step of {rows_per_step} "
                "rows; resume with the global batch size of the run that saved it"
            )
        self.store, self.data_config = store, data_config
        self.micro_batches_per_step = rows_per_step // unit
        self.rows_per_step, self.micro_batch_size = rows_per_step, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self._next_row, self._delivered = start_row, 0
        self._streams = make_rows(store, data_config, seed)
        self.mixture = make_mixture(self._streams, data_config, seed)
        self._sources, self._rows = list(store.sources.values()), list(self._streams.values())
        # Cut documents fill their rows; other rows are as long as what is in them.
        self._full_rows = data_config.packing and data_config.content == "documents"
        self._step_rows: tuple[int, list[DrawnRow]] = (-1, [])

    def state(self) -> dict[str, int]:
        """Return the first row of the step that is not finished yet."""
        return {"next_row": self._next_row}

    def epochs(self) -> dict[str, float]:
        """Return the passes over each source that finished steps have made."""
        return self.mixture.epochs_at(self._next_row)

    def fill_shares(self) -> dict[str, float]:
        """Return the share of each source's rows that tokens fill, where rows are packed."""
        return {name: rows.fill_share for name, rows in self._streams.items()}

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the current state on; the state moves as batches are taken."""
        self._delivered = 0  # a step that was left half-way begins again
        index = self._next_row // self.rows_per_step * self.micro_batches_per_step
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as executor:
            pending: deque[Future[Batch]] = deque()
            while True:
                while len(pending) < PREFETCH_BATCHES:
                    pending.append(executor.submit(self.batch, index))
                    index += 1
                batch = pending.popleft().result()
                self._delivered += 1
                if self._delivered == self.micro_batches_per_step:
                    self._next_row, self._delivered = self._next_row + self.rows_per_step, 0
                yield batch

    def batch(self, index: int) -> Batch:
        """Return this rank's ``index``-th micro-batch of the whole run."""
        unit = self.world_size * self.micro_batch_size
        start = index * unit + self.rank * self.micro_batch_size
        if self._full_rows:
            drawn = self._draw(start, start + self.micro_batch_size)
        else:
            step, at = divmod(start, self.rows_per_step)
            drawn = self._by_length(step)[at : at + self.micro_batch_size]
        config = self.data_config
        rows = [self._read(row) for row in drawn]
        return collate(
            rows,
            length=config.max_length if self._full_rows else batch_width(rows, config.max_length),
            pad_token_id=self.store.pad_token_id,
            isolate=config.packing and config.isolate_documents,
        )

    def _draw(self, start: int, stop: int) -> list[DrawnRow]:
        source_ids, source_rows = self.mixture.draw(start, stop)
        pairs = zip(source_ids.tolist(), source_rows.tolist(), strict=True)
        return [
            DrawnRow(start + i, source_id, self._rows[source_id].row(source_row))
            for i, (source_id, source_row) in enumerate(pairs)
        ]

    def _by_length(self, step: int) -> list[DrawnRow]:
        """Return all rows of an optimizer step, the longest first."""
        if self._step_rows[0] != step:
            drawn = self._draw(step * self.rows_per_step, (step + 1) * self.rows_per_step)
            self._step_rows = step, sorted(drawn, key=lambda row: -row.length)
        return self._step_rows[1]

    def _read(self, drawn: DrawnRow) -> Row:
        source = self._sources[drawn.source_id]
        pieces, weights = [], []
        for document, start, stop in drawn.pieces:
            pieces.append(source.document(document)[start:stop])
            own = source.document_weights(document)
            if own is not None:
                weights.append(own[start:stop])
        return Row(pieces, drawn.number, drawn.source_id, weights or None)


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
            pad = self._store.pad_token_id
            width = batch_width(rows, self._max_length)
            yield collate(rows, length=width, pad_token_id=pad, isolate=False)

    def _row(self, index: int) -> Row:
        if index >= len(self._windows):
            return Row([], -1, self._source_id)
        document, start, stop = self._windows[index]
        pieces = [self._source.document(document)[start:stop]]
        if self._source.weights is None:
            return Row(pieces, index, self._source_id)
        return Row(pieces, index, self._source_id, [self._weights(document)[start:stop]])

    def _weights(self, document: int) -> NDArray[np.float32]:
        """Return 1 for each trained token: figures per character know no heavier ones."""
        own = self._source.document_weights(document)
        assert own is not None
        return (own > 0).astype(np.float32)
