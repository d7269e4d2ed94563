"""From a source's documents to rows of a fixed length, as arithmetic over lengths.

An epoch is the source's documents in a shuffled order. Packed, they form one stream that is cut
every ``max_length`` tokens; unpacked, each document is cut into pieces of its own. Conversations
are never cut: packed, they are dealt whole to bins. In every way each token of the epoch lands in
exactly one row, and any row is found without building those before it.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.data.batches.bins import fill_bins
from trainer.errors import DataError


class Piece(NamedTuple):
    """Tokens ``start..stop-1`` of a document."""

    document: int
    start: int
    stop: int


class Rows(Protocol):
    """The endless stream of rows of one source: epoch after epoch, each in its own order."""

    rows_per_epoch: int
    fill_share: float  # of the tokens that rows of the full length would hold

    def row(self, index: int) -> list[Piece]:
        """Return the pieces of row ``index`` of the stream, in order."""


class Packer:
    """Rows of documents that may be cut.

    Args:
        documents: ``[n]`` indices of the documents to use.
        lengths: ``[n]`` their lengths in tokens.
        max_length: tokens a row.
        packing: False gives each row a piece of one document only.
        seed_key: decides the orders; name the seed and the source in it.
    """

    def __init__(
        self,
        documents: NDArray[np.int64],
        lengths: NDArray[np.int64],
        *,
        max_length: int,
        packing: bool,
        seed_key: str,
    ) -> None:
        self.max_length, self.packing, self.seed_key = max_length, packing, seed_key
        self._documents, self._lengths = documents, lengths
        self._epoch = -1
        self._order = np.empty(0, np.int64)
        self._ends = np.empty(0, np.int64)
        if packing:
            self.rows_per_epoch = -(-int(lengths.sum()) // max_length)
        else:
            self.rows_per_epoch = int((-(-lengths // max_length)).sum())
        self.fill_share = int(lengths.sum()) / max(1, self.rows_per_epoch * max_length)

    def row(self, index: int) -> list[Piece]:
        """Return the pieces of row ``index`` of the stream, in order."""
        epoch, row = divmod(index, self.rows_per_epoch)
        if epoch != self._epoch:
            self._enter(epoch)
        return self._packed(row) if self.packing else self._unpacked(row)

    def _enter(self, epoch: int) -> None:
        """Shuffle for ``epoch``; ``_ends`` counts tokens (packed) or rows (unpacked)."""
        self._order = shuffle(len(self._documents), f"{self.seed_key}/{epoch}")
        units = self._lengths[self._order]
        self._ends = np.cumsum(units if self.packing else -(-units // self.max_length))
        self._epoch = epoch

    def _packed(self, row: int) -> list[Piece]:
        begin = row * self.max_length
        end = min(begin + self.max_length, int(self._ends[-1]))
        at = int(np.searchsorted(self._ends, begin, side="right"))
        pieces = []
        while begin < end:
            document_end, chosen = int(self._ends[at]), self._order[at]
            document_start = document_end - int(self._lengths[chosen])
            stop = min(end, document_end)
            span = (begin - document_start, stop - document_start)
            pieces.append(Piece(int(self._documents[chosen]), *span))
            begin, at = stop, at + 1
        return pieces

    def _unpacked(self, row: int) -> list[Piece]:
        at = int(np.searchsorted(self._ends, row, side="right"))
        chosen = self._order[at]
        length = int(self._lengths[chosen])
        first_row = int(self._ends[at]) + -length // self.max_length
        start = (row - first_row) * self.max_length
        stop = min(start + self.max_length, length)
        return [Piece(int(self._documents[chosen]), start, stop)]


class WholePacker:
    """Rows of whole documents, as many in each as fit.

    How many documents of which length share a bin is decided once; which they are, and the order
    of the bins, anew for each epoch.

    Args:
        documents: ``[n]`` indices of the documents to use.
        lengths: ``[n]`` their lengths in tokens.
        max_length: tokens a row.
        seed_key: decides the orders; name the seed and the source in it.

    Raises:
        DataError: a document is longer than a row.
    """

    def __init__(
        self,
        documents: NDArray[np.int64],
        lengths: NDArray[np.int64],
        *,
        max_length: int,
        seed_key: str,
    ) -> None:
        longest = int(lengths.max(initial=0))
        if longest > max_length:
            raise DataError(
                f"a prepared conversation has {longest} tokens, more than data.max_length="
                f"{max_length}; run `kuroshio prepare` with the max_length of this run"
            )
        self.seed_key = seed_key
        self._documents, self._lengths = documents, lengths
        self._bins = fill_bins(lengths, max_length)
        self._epoch = -1
        self._order = self._sorted = np.empty(0, np.int64)
        self.rows_per_epoch = len(self._bins)
        self.fill_share = int(lengths.sum()) / max(1, self.rows_per_epoch * max_length)

    def row(self, index: int) -> list[Piece]:
        """Return the documents of row ``index`` of the stream, the longest first."""
        epoch, row = divmod(index, self.rows_per_epoch)
        if epoch != self._epoch:
            self._enter(epoch)
        chosen = self._sorted[self._bins[int(self._order[row])]]
        pairs = zip(self._documents[chosen].tolist(), self._lengths[chosen].tolist(), strict=True)
        return [Piece(document, 0, length) for document, length in pairs]

    def _enter(self, epoch: int) -> None:
        """Shuffle the bins for ``epoch``, and documents of equal length among them."""
        self._order = shuffle(self.rows_per_epoch, f"{self.seed_key}/{epoch}")
        dealt = shuffle(len(self._documents), f"{self.seed_key}/{epoch}/documents")
        self._sorted = dealt[np.argsort(-self._lengths[dealt], kind="stable")]
        self._epoch = epoch


def shuffle(num_items: int, key: str) -> NDArray[np.int64]:
    """Return a permutation that depends on ``key`` alone, on every machine and numpy version.

    Items are sorted by SplitMix64 of their index (Steele, Lea & Flood 2014, OOPSLA): numpy's own
    generators promise no fixed stream across versions, and a resumed run must replay this order.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    base = np.uint64(int.from_bytes(digest, "little"))
    mixed = base + np.arange(1, num_items + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(mixed ^ (mixed >> np.uint64(31)), kind="stable")
