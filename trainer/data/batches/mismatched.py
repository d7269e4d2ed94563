"""Prompts with the answers to other prompts, by which KTO measures how far a policy has moved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.data.batches.collate import Batch, Example, Row, batch_width, collate
from trainer.data.prepared.store import SourceStore

Sequences = tuple[NDArray[np.int64], NDArray[np.float32]]


def find_partners(prompt_hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return for each document the next one with another prompt, cyclically. [n] -> [n]

    All are -1 where there is only one prompt.
    """
    changes = np.flatnonzero(prompt_hashes != np.roll(prompt_hashes, 1))  # where a run begins
    if not len(changes):
        return np.full(len(prompt_hashes), -1, np.int64)
    after = np.searchsorted(changes, np.arange(len(prompt_hashes)), side="right")
    return changes[after % len(changes)]


class MismatchedAnswers:
    """Each document's prompt with the answer of the next document that has another prompt.

    Args:
        sources: of preferences, in the store's order.
        max_length: tokens of a row; a longer sequence's answer is cut.
        packing: False gives each sequence a row of its own.
        pad_token_id: any valid id.
    """

    def __init__(
        self,
        sources: Sequence[SourceStore],
        *,
        max_length: int,
        packing: bool,
        pad_token_id: int,
    ) -> None:
        self._sources, self._max_length = list(sources), max_length
        self._packing, self._pad_token_id = packing, pad_token_id
        self._partners = [find_partners(np.asarray(source.text_hashes)) for source in sources]

    def of(self, batch: Batch) -> Batch:
        """Return the mismatched sequences of a batch's documents, of which there may be none.

        Its examples have the side 0 and their document's number.
        """
        examples = batch.examples
        assert examples is not None
        sources = batch.source_ids[examples.rows].tolist()
        pairs = zip(sources, examples.documents.tolist(), examples.pairs.tolist(), strict=True)
        # Both sides of a pair name the same document; each occurrence in the batch counts once.
        chosen = list(dict.fromkeys(pairs))
        return self.read([(source, document) for source, document, _ in chosen])

    def read(self, documents: Sequence[tuple[int, int]]) -> Batch:
        """Return the mismatched sequences of documents, each given as (source, document)."""
        rows: list[Row] = []
        room = 0
        for number, (source_id, document) in enumerate(documents):
            if self._partners[source_id][document] < 0:
                continue
            ids, weights = self._sequence(source_id, document)
            example = Example((number, 0), 0, document, 0.0)
            if rows and self._packing and len(ids) <= room and rows[-1].source_id == source_id:
                row = rows.pop()
            else:
                row, room = Row([], -1, source_id, [], []), self._max_length
            rows.append(_append(row, ids, weights, example))
            room -= len(ids)
        rows = rows or [Row([], -1, 0, examples=[])]
        return collate(
            rows,
            length=batch_width(rows, self._max_length),
            pad_token_id=self._pad_token_id,
            isolate=self._packing,
        )

    def _sequence(self, source_id: int, document: int) -> Sequences:
        """Return ids and loss weights of a document's prompt and its partner's answer."""
        source = self._sources[source_id]
        ids, weights = _one_sequence(source, document)
        other_ids, other_weights = _one_sequence(source, int(self._partners[source_id][document]))
        end, start = int(np.argmax(weights > 0)), int(np.argmax(other_weights > 0))
        ids = np.concatenate([ids[:end], other_ids[start:]])
        weights = np.concatenate([weights[:end], other_weights[start:]])
        return ids[: self._max_length], weights[: self._max_length]


def _one_sequence(source: SourceStore, document: int) -> Sequences:
    """Return ids and weights of a document's chosen sequence, or of its only one."""
    assert source.first_lengths is not None
    ids, weights = source.document(document), source.document_weights(document)
    assert weights is not None
    span = slice(int(source.first_lengths[document]) or len(ids))
    return ids[span].astype(np.int64), weights[span]


def _append(row: Row, ids: NDArray[np.int64], weights: NDArray[np.float32], it: Example) -> Row:
    assert row.weights is not None and row.examples is not None
    return Row([*row.pieces, ids], -1, row.source_id, [*row.weights, weights], [*row.examples, it])
