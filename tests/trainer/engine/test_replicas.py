"""Comparing replicas: digests, and who is said to differ."""

from __future__ import annotations

import pytest
import torch

from trainer.engine.replicas import describe_difference, digest, draw

NAMES = ["embed.weight", "norm.weight", "head.weight|exp_avg"]
HOSTS = ["n1", "n1", "n2", "n2"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_every_flipped_bit_changes_the_digest(dtype: torch.dtype) -> None:
    values = torch.arange(33).to(dtype)  # ends within a word of 64 bits
    words = values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.element_size()])
    before = int(digest(values))
    for bit in range(8 * values.element_size() - 1):
        for place in (17, 32):
            words[place] ^= 1 << bit
            assert int(digest(values)) != before, (place, bit)
            words[place] ^= 1 << bit
    padded = torch.cat([values[:1], values])[1:]  # equal, but it begins within a word
    assert int(digest(padded)) == before


def test_nan_counts_by_its_bits() -> None:
    broken = torch.tensor([1.0, float("nan")])
    assert int(digest(broken)) == int(digest(broken.clone()))


def test_the_minority_is_named_with_its_host_and_what_differs_first() -> None:
    sums = [[1, 2, 3], [1, 2, 3], [1, 7, 4], [1, 2, 3]]
    text = describe_difference(NAMES, sums, HOSTS, 12)
    assert text.startswith("silent corruption, rank 2 on n2 after step 12: norm.weight is not what")


def test_without_a_majority_nobody_is_accused() -> None:
    text = describe_difference(NAMES, [[1, 2, 3], [1, 2, 4]], ["n1", "n2"], 12)
    assert "after step 12: no majority among ranks on n1, n2: head.weight|exp_avg is not" in text


@pytest.mark.parametrize("period", [1, 50, 100, 1000])
def test_every_split_module_has_its_turn(period: int) -> None:
    names = [f"layers.{number}.weight" for number in range(200)]
    turns = [draw(names, step) for step in range(period, 3000 * period, period)]
    assert set(turns) == set(names)
    assert turns[:50] == [draw(names, period * turn) for turn in range(1, 51)]  # on all ranks
