"""Rows of preferences: documents of two sequences, cut where the second begins."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.data.batches.collate import Example, Row
from trainer.data.prepared.store import SourceStore


def read_pairs(source: SourceStore, documents: Sequence[int], number: int, source_id: int) -> Row:
    """Return the row of some documents of a source of preferences.

    Args:
        source: with ``first_lengths``.
        documents: in the order they stand in the row.
        number: of the row in the run.
        source_id: of the source in the store.
    """
    assert source.first_lengths is not None and source.margins is not None
    pieces, weights, examples = [], [], []
    for place, document in enumerate(documents):
        tokens, own = source.document(document), source.document_weights(document)
        assert own is not None
        first, margin = int(source.first_lengths[document]), float(source.margins[document])
        for side, span in ((1, np.s_[:first]), (-1, np.s_[first:])):
            if len(tokens[span]):  # one side of a lone example is empty
                pieces.append(tokens[span])
                weights.append(own[span])
                examples.append(Example((number, place), side, document, margin))
    return Row(pieces, number, source_id, weights, examples)
