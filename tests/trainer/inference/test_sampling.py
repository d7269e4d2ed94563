"""Drawn tokens follow the distribution, row by row."""

from __future__ import annotations

import pytest
import torch

from trainer.inference.decoding import Decoding
from trainer.inference.sampling import SeededChoice, sampling_processors

NOTHING = torch.zeros(1, 1, dtype=torch.long)


def draw(decoding: Decoding, scores: torch.Tensor, names: list[str]) -> torch.Tensor:
    processors = sampling_processors(decoding, names)
    return processors(torch.zeros(len(names), 1, dtype=torch.long), scores.clone()).argmax(-1)


def test_frequencies_are_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    choice = SeededChoice(0, [str(n) for n in range(4000)])
    drawn = choice(NOTHING, probabilities.log().expand(4000, 5)).argmax(-1)
    frequencies = drawn.bincount(minlength=5) / 4000
    assert frequencies[1] == 0
    assert float((frequencies - probabilities).abs().max()) < 0.03


@pytest.mark.parametrize(
    ("decoding", "allowed"),
    [
        (Decoding(temperature=1.0, top_p=1.0, top_k=2), {0, 1}),
        (Decoding(temperature=1.0, top_p=0.75), {0, 1}),
        (Decoding(temperature=1.0, top_p=1.0, min_p=0.3), {0, 1, 2}),
        (Decoding(temperature=1e-4, top_p=1.0), {0}),
        (Decoding(temperature=1.0, top_p=1.0), {0, 1, 2, 3}),
    ],
)
def test_parameters_leave_out_what_they_should(decoding: Decoding, allowed: set[int]) -> None:
    scores = torch.tensor([0.5, 0.3, 0.16, 0.04]).log().expand(600, 4)
    drawn = draw(decoding, scores, [str(n) for n in range(600)])
    assert set(drawn.tolist()) == allowed


def test_rows_keep_their_numbers_in_any_company() -> None:
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    names, decoding = ["a", "b", "c"], Decoding(temperature=1.0, top_p=1.0, seed=5)
    together = draw(decoding, scores, names)
    alone = [int(draw(decoding, scores[n : n + 1], [names[n]])) for n in range(3)]
    assert together.tolist() == alone
    steps = SeededChoice(5, ["a"])
    flat = torch.zeros(1, 1000)
    assert len({int(steps(NOTHING, flat).argmax()) for _ in range(8)}) > 4, "each step draws anew"


def test_largest_number_still_draws_a_possible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.Random.getrandbits", lambda self, bits: 2**bits - 1)
    scores = torch.tensor([[0.1, 0.2, 0.7, 0.0]]).log()
    assert int(SeededChoice(0, ["a"])(NOTHING, scores).argmax()) == 2


def test_greedy_has_no_processors() -> None:
    assert not sampling_processors(Decoding(temperature=0.0), ["a"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1: expected 0 (greedy) or more"),
        ({"top_p": 0.0}, "top_p=0.0: expected more than 0"),
        ({"min_p": 1.5}, "min_p=1.5: expected 0 (off) to 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: expected 1 or more"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: expected more than 0"),
        ({"stop": ["a", ""]}, "stop=['a', '']: expected texts of at least one character"),
        ({"num_beams": 4}, "num_beams=4 with temperature=0.7: beam search is deterministic"),
    ],
)
def test_contradictions_are_named(values: dict[str, object], message: str) -> None:
    (problem,) = Decoding(**values).problems()  # type: ignore[arg-type]
    assert message in problem
