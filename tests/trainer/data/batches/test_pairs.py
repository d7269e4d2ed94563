"""Rows of preference pairs: where the sequences of a batch are, packed and padded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trainer.config import DataConfig, SourceConfig
from trainer.data.batches.collate import collate
from trainer.data.batches.eval_loader import EvalLoader
from trainer.data.batches.loader import TrainLoader
from trainer.data.batches.pairs import read_pairs
from trainer.data.prepared.store import SourceStore, TokenStore
from trainer.losses.cross_entropy import IGNORE_INDEX

# prompt, chosen answer, rejected answer; an empty answer makes a lone example.
PAIRS = [
    ([1, 11, 12], [21, 22, 2], [31, 2]),
    ([1, 13], [23, 2], [33, 34, 35, 2]),
    ([1, 14], [24, 2], []),
    ([1, 15], [], [36, 37, 2]),
    ([1, 16, 17, 18], [25, 2], [38, 2]),
]


@pytest.fixture
def source() -> SourceStore:
    tokens: list[int] = []
    weights: list[float] = []
    lengths, firsts = [], []
    for prompt, *answers in PAIRS:
        sides = [[*prompt, *answer] if answer else [] for answer in answers]
        tokens += sides[0] + sides[1]
        for answer in answers:
            weights += ([0.0] * len(prompt) + [1.0] * len(answer)) if answer else []
        lengths.append(len(sides[0] + sides[1]))
        firsts.append(len(sides[0]))
    count = len(PAIRS)
    return SourceStore(
        name="pairs",
        folder=Path(),
        tokens=np.array(tokens, np.uint16),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        num_chars=np.full(count, 4, np.uint32),
        num_bytes=np.full(count, 12, np.uint32),
        text_hashes=np.arange(count, dtype=np.uint64) * np.uint64(2**61),
        holdout_share=0.0,
        manifest={},
        weights=np.array(weights, np.float32),
        first_lengths=np.array(firsts, np.uint32),
        margins=np.arange(count, dtype=np.float32),
    )


def data_config(packing: bool) -> DataConfig:
    sources = {"pairs": SourceConfig(["unread"])}
    return DataConfig(sources, content="preferences", max_length=16, packing=packing)


def test_a_document_is_cut_where_its_second_sequence_begins(source: SourceStore) -> None:
    row = read_pairs(source, [0, 2, 3], number=7, source_id=0)
    batch = collate([row], length=None, pad_token_id=0, isolate=True)
    assert [piece.tolist() for piece in row.pieces] == [
        [1, 11, 12, 21, 22, 2], [1, 11, 12, 31, 2], [1, 14, 24, 2], [1, 15, 36, 37, 2],
    ]  # fmt: skip
    examples = batch.examples
    assert examples is not None and examples.num_pairs == 3
    assert examples.sides.tolist() == [1, -1, 1, -1]
    assert examples.pairs.tolist() == [0, 0, 1, 2]
    assert examples.documents.tolist() == [0, 0, 2, 3]
    assert examples.margins.tolist() == [0.0, 0.0, 2.0, 3.0]
    for place, piece in enumerate(row.pieces):
        span = slice(int(examples.starts[place]), int(examples.stops[place]))
        assert batch.input_ids[0, span].tolist() == piece.tolist()
        assert batch.position_ids[0, span].tolist() == list(range(len(piece)))
    learnt = batch.input_ids[0][batch.labels[0] != IGNORE_INDEX].tolist()
    assert learnt == [21, 22, 2, 31, 2, 24, 2, 36, 37, 2]


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_holds_both_sides_of_every_pair_in_one_batch(
    source: SourceStore, packing: bool
) -> None:
    store = TokenStore({"pairs": source}, 1, 2, 0)
    num_rows = 1 if packing else len(PAIRS)
    loader = TrainLoader(
        store, data_config(packing), seed=3, rows_per_step=num_rows, micro_batch_size=num_rows,
        rank=0, world_size=1,
    )  # fmt: skip
    seen = []
    for index in range(int(loader.mixture.rows_per_pass) // num_rows):
        batch = loader.batch(index)
        examples = batch.examples
        assert examples is not None
        for pair in range(examples.num_pairs):
            own = examples.pairs == pair
            (document,) = set(examples.documents[own].tolist())
            prompt, chosen, rejected = PAIRS[document]
            expected = [s for s, answer in ((1, chosen), (-1, rejected)) if answer]
            assert examples.sides[own].tolist() == expected
            for row, start, stop, side in zip(
                examples.rows[own], examples.starts[own], examples.stops[own], expected, strict=True
            ):
                text = batch.input_ids[row, start:stop].tolist()
                assert text == prompt + (chosen if side == 1 else rejected)
                assert packing or start == 0
            seen.append(document)
        if not packing:
            assert len(batch.input_ids) == sum(bool(a) + bool(b) for _, a, b in PAIRS)
    assert sorted(seen) == list(range(len(PAIRS)))


@pytest.mark.parametrize("packing", [True, False])
def test_held_out_pairs_come_once_over_all_ranks(source: SourceStore, packing: bool) -> None:
    store = TokenStore({"pairs": replace(source, holdout_share=1.0)}, 1, 2, 0)
    seen = []
    for rank in range(2):
        loader = EvalLoader(
            store, data_config(packing), "pairs", max_chars=1000, micro_batch_size=2, rank=rank,
            world_size=2,
        )  # fmt: skip
        for batch in loader:
            assert batch.examples is not None
            seen += batch.examples.documents[batch.examples.sides == 1].tolist()
            seen += batch.examples.documents[batch.examples.sides == -1].tolist()
    expected = [i for i, (_, *answers) in enumerate(PAIRS) for answer in answers if answer]
    assert sorted(seen) == expected
