"""Rows of prompts with responses: what is a target, where it is, and how rows are dealt."""

from __future__ import annotations

from random import Random

import pytest
import torch

from trainer.losses.cross_entropy import IGNORE_INDEX
from trainer.rollout.answer_rows import AnswerBatch, Layout, Sample, deal


def make_samples(num: int) -> list[Sample]:
    random = Random(1)
    return [
        Sample(
            [random.randint(5, 99) for _ in range(random.randint(1, 9))],
            [random.randint(5, 99) for _ in range(random.randint(1, 12))],
        )
        for _ in range(num)
    ]


def read_targets(batch: AnswerBatch) -> list[int]:
    """Return the targets in the order in which a model yields their log-probabilities."""
    shifted = batch.labels[:, 1:]
    return shifted[shifted != IGNORE_INDEX].tolist()


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world_size", [1, 3])
def test_every_response_token_is_a_target_once(packing: bool, world_size: int) -> None:
    samples = make_samples(17)
    chosen = [n for n in range(17) if n % 4 != 1]
    seen: list[int] = []
    counts = []
    for rank in range(world_size):
        layout = Layout(32, 2, packing, 0, rank, world_size)
        batches = list(deal(samples, chosen, layout))
        counts.append(len(batches))
        for batch in batches:
            if not batch.samples:
                assert len(read_targets(batch)) == 1  # a forward and a backward, for nothing
                continue
            seen += batch.samples
            responses = [samples[n].response for n in batch.samples]
            assert read_targets(batch) == [token for response in responses for token in response]
            assert batch.input_ids.flatten()[batch.last].tolist() == [r[-1] for r in responses]
    assert sorted(seen) == chosen
    assert len(set(counts)) == 1


def test_states_are_the_places_before_the_targets() -> None:
    samples = make_samples(9)
    (batch,) = deal(samples, range(9), Layout(200, 9, True, 0))
    ids = batch.input_ids.flatten()
    assert ids[batch.before + 1].tolist() == read_targets(batch)
    firsts = [samples[n].prompt[-1] for n in batch.samples]
    at = torch.tensor([0, *[len(samples[n].response) for n in batch.samples]]).cumsum(0)[:-1]
    assert ids[batch.before[at]].tolist() == firsts


def test_packed_rows_hold_little_padding_and_restart_positions() -> None:
    samples = make_samples(60)
    (batch,) = deal(samples, range(60), Layout(64, 60, True, 0))
    assert sum(map(len, samples)) / batch.input_ids.numel() > 0.9
    assert int((batch.position_ids == 0).sum()) >= 60


def test_rows_of_a_batch_are_as_wide_as_their_longest() -> None:
    samples = [Sample([1], [2] * n) for n in (1, 3, 30)]
    widths = [b.input_ids.shape[1] for b in deal(samples, range(3), Layout(64, 1, False, 0))]
    assert widths == [32, 8, 8]


def test_few_rows_are_shared_by_all_ranks() -> None:
    samples = make_samples(5)
    dealt = [list(deal(samples, range(5), Layout(32, 4, False, 0, rank, 3))) for rank in range(3)]
    assert [[len(batch.samples) for batch in own] for own in dealt] == [[2], [2], [1]]
