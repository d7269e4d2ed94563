"""Which prompts each step answers, the same on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.config import DataConfig
from trainer.data.batches.loader import make_mixture, make_rows
from trainer.data.prepared.store import SourceStore, TokenStore


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        ids: its tokens, up to where the answer begins.
        answer: what the data gives as its answer, None where it gives none.
        chat: messages and tools that the chat template made it of.
    """

    ids: Sequence[int]
    answer: str | None
    chat: Mapping[str, Any]


class PromptLoader:
    """An endless iterator over the prompts of one step after the other.

    Step k takes prompts ``k * prompts_per_step .. (k + 1) * prompts_per_step - 1`` of the run,
    which hang on the seed alone: the whole state is one number.

    Args:
        store: the prepared sources.
        data: mixture weights.
        seed: decides mixture and order.
        prompts_per_step: over all ranks.
        start_row: ``state()["next_row"]`` of the run to go on with.

    Raises:
        DataError: no source has prompts to train on.
    """

    def __init__(
        self, store: TokenStore, data: DataConfig, seed: int, prompts_per_step: int, start_row: int
    ) -> None:
        rows = make_rows(store, data, seed)  # a row is a prompt
        self.mixture = make_mixture(rows, data, seed)
        self.prompts_per_step, self._next_row = prompts_per_step, start_row
        self._sources, self._rows = list(store.sources.values()), list(rows.values())

    def state(self) -> dict[str, int]:
        """Return the first prompt of the next step."""
        return {"next_row": self._next_row}

    def epochs(self) -> dict[str, float]:
        """Return the passes over each source that the steps so far have made."""
        return self.mixture.epochs_at(self._next_row)

    def __iter__(self) -> Iterator[list[Prompt]]:
        """Yield the prompts of each step; the state moves as they are taken."""
        while True:
            start = self._next_row
            self._next_row += self.prompts_per_step
            source_ids, source_rows = self.mixture.draw(start, self._next_row)
            yield [
                read_prompt(self._sources[source_id], self._rows[source_id].row(row)[0].document)
                for source_id, row in zip(source_ids.tolist(), source_rows.tolist(), strict=True)
            ]


def read_prompt(source: SourceStore, document: int) -> Prompt:
    """Return one prompt of a source."""
    chat = source.chat(document)
    assert chat is not None  # the store's content is prompts
    return Prompt(source.document(document).tolist(), source.answer(document), chat)


def held_out_prompts(source: SourceStore, max_chars: int) -> list[Prompt]:
    """Return held-out prompts in the order of their hashes, up to ``max_chars``, one at least."""
    documents = source.document_ids(held_out=True)
    documents = documents[np.argsort(source.text_hashes[documents], kind="stable")]
    chars = np.cumsum(source.num_chars[documents], dtype=np.int64)
    num_taken = max(1, int(np.searchsorted(chars, max_chars, side="right")))
    return [read_prompt(source, document) for document in documents[:num_taken].tolist()]
