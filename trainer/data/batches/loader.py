"""Batches for training, computed from row numbers alone.

The content of a row hangs on the seed and the row's number, never on ranks, accumulation or
micro-batch size. So the whole state of a training loader is one integer. Rows of uneven length are
dealt within their optimizer step by length, so that all ranks pad little and finish together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from trainer.config import DataConfig
from trainer.data.batches.collate import Batch, Row, batch_width, collate, split_sequences
from trainer.data.batches.mixture import Mixture
from trainer.data.batches.pack import Packer, Piece, Rows, WholePacker
from trainer.data.batches.pairs import read_pairs
from trainer.data.prepared.store import SourceStore, TokenStore
from trainer.errors import ConfigError

WHOLE = ("conversations", "preferences")  # never cut: preparation made them fit
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
    if data.content in WHOLE and data.packing:
        return WholePacker(documents, lengths, max_length=data.max_length, seed_key=key)
    packing = data.packing and data.content != "prompts"  # those are rows of their own
    return Packer(documents, lengths, max_length=data.max_length, packing=packing, seed_key=key)


def make_mixture(rows: Mapping[str, Rows], data: DataConfig, seed: int) -> Mixture:
    """Return which source each row of a run comes from.

    Raises:
        DataError: no source has rows to train on.
    """
    weights = {name: data.sources[name].weight for name in rows}
    rows_per_epoch = {name: own.rows_per_epoch for name, own in rows.items()}
    return Mixture(weights, rows_per_epoch, seed, by_pass=data.weights_are == "epochs")


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
        if config.content == "preferences" and not config.packing:
            rows = [sequence for row in rows for sequence in split_sequences(row)]
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
        if source.first_lengths is not None:
            documents = [piece.document for piece in drawn.pieces]
            return read_pairs(source, documents, drawn.number, drawn.source_id)
        pieces, weights = [], []
        for document, start, stop in drawn.pieces:
            pieces.append(source.document(document)[start:stop])
            own = source.document_weights(document)
            if own is not None:
                weights.append(own[start:stop])
        return Row(pieces, drawn.number, drawn.source_id, weights or None)
