"""Prompts with other prompts' answers: partners, cuts, packing, what is left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trainer.data.batches.collate import collate
from trainer.data.batches.mismatched import MismatchedAnswers, find_partners
from trainer.data.batches.pairs import read_pairs
from trainer.data.prepared.store import SourceStore
from trainer.losses.cross_entropy import IGNORE_INDEX

# prompt, chosen answer, rejected answer; an empty answer makes a lone example.
PAIRS = [
    ([1, 11, 12], [21, 22, 2], [31, 2]),
    ([1, 11, 12], [23, 2], [33, 34, 2]),  # the prompt of the one before
    ([1, 13], [], [36, 37, 2]),
    ([1, 14, 15, 16], [24, 2], []),
]
HASHES = [5, 5, 6, 7]
EXPECTED = {
    0: ([1, 11, 12, 36, 37, 2], [36, 37, 2]),
    1: ([1, 11, 12, 36, 37, 2], [36, 37, 2]),
    2: ([1, 13, 24, 2], [24, 2]),
    3: ([1, 14, 15, 16, 21, 22, 2], [21, 22, 2]),
}


@pytest.fixture
def source() -> SourceStore:
    sequences = [[[*p, *a] if a else [] for a in answers] for p, *answers in PAIRS]
    lengths = [len(chosen) + len(rejected) for chosen, rejected in sequences]
    given = [(prompt, answer) for prompt, *answers in PAIRS for answer in answers if answer]
    return SourceStore(
        name="pairs",
        folder=Path(),
        tokens=np.concatenate([[*prompt, *answer] for prompt, answer in given]).astype(np.uint16),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        num_chars=np.full(len(PAIRS), 4, np.uint32),
        num_bytes=np.full(len(PAIRS), 12, np.uint32),
        text_hashes=np.array(HASHES, np.uint64),
        holdout_share=0.0,
        manifest={},
        weights=np.concatenate([np.repeat([0, 1], [len(p), len(a)]) for p, a in given]).astype(
            "f4"
        ),
        first_lengths=np.array([len(chosen) for chosen, _ in sequences], np.uint32),
        margins=np.zeros(len(PAIRS), np.float32),
    )


def mismatched(
    source: SourceStore, max_length: int = 16, packing: bool = True
) -> MismatchedAnswers:
    return MismatchedAnswers([source], max_length=max_length, packing=packing, pad_token_id=0)


def test_the_partner_is_the_next_document_with_another_prompt() -> None:
    assert find_partners(np.array([5, 5, 6, 7, 7], np.uint64)).tolist() == [2, 2, 3, 0, 0]
    # The last run and the first one are of the same prompt.
    assert find_partners(np.array([5, 6, 6, 5], np.uint64)).tolist() == [1, 3, 3, 1]
    assert find_partners(np.array([4, 4], np.uint64)).tolist() == [-1, -1]
    assert find_partners(np.array([4], np.uint64)).tolist() == [-1]


@pytest.mark.parametrize("packing", [True, False])
def test_each_document_of_a_batch_gets_one_sequence(source: SourceStore, packing: bool) -> None:
    row = read_pairs(source, [0, 1, 2, 3], number=9, source_id=0)
    batch = collate([row], length=None, pad_token_id=0, isolate=True)
    other = mismatched(source, packing=packing).of(batch)
    examples = other.examples
    assert examples is not None
    assert examples.documents.tolist() == [0, 1, 2, 3] and set(examples.sides.tolist()) == {0}
    assert len(other.input_ids) == (2 if packing else 4)
    for place, document in enumerate(examples.documents.tolist()):
        span = slice(int(examples.starts[place]), int(examples.stops[place]))
        text, learnt = EXPECTED[document]
        line = int(examples.rows[place])
        assert other.input_ids[line, span].tolist() == text
        assert other.position_ids[line, span].tolist() == list(range(len(text)))
        labels = other.labels[line, span]
        assert labels[labels != IGNORE_INDEX].tolist() == learnt


def test_a_long_answer_is_cut_to_the_row(source: SourceStore) -> None:
    batch = mismatched(source, max_length=5).read([(0, 3), (0, 2)])
    assert batch.piece_lengths == [[5], [4]]
    assert batch.input_ids[0, :5].tolist() == [1, 14, 15, 16, 21]


def test_without_another_prompt_there_is_nothing(source: SourceStore) -> None:
    same = replace(source, text_hashes=np.full(len(PAIRS), 5, np.uint64))
    batch = mismatched(same).read([(0, 0), (0, 1)])
    assert batch.examples is not None and not len(batch.examples.rows)
    assert batch.num_trained == 0 and batch.input_ids.shape[0] == 1
