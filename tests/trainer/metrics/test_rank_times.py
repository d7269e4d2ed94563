"""Who is the slowest rank."""

from __future__ import annotations

import time

import pytest
import torch

from trainer.metrics.rank_report import tabulate_ranks
from trainer.metrics.rank_times import MAX_SLOWEST, RankTimes, compare

CPU = torch.device("cpu")


def test_the_slowest_rank_is_compared_with_the_median() -> None:
    found = compare([[0.1, 0.2], [0.5, 0.2], [0.1, 0.1]], ["a", "b", "c"])
    assert found.median_s == pytest.approx(0.3)
    assert [row["rank"] for row in found.ranks] == [1, 0, 2]
    assert found.ranks[0] == {"rank": 1, "host": "b", "seconds": 0.7, "data_seconds": 0.5}
    assert found.figures() == {"slowest_rank": 1, "slowest_rank_delay_s": pytest.approx(0.4)}


def test_of_two_ranks_the_slower_one_is_no_measure_of_itself() -> None:
    assert compare([[0.0, 1.0], [0.0, 3.0]], ["a", "b"]).median_s == 1.0


def test_of_many_ranks_the_slowest_are_recorded() -> None:
    times = [[0.0, float(rank)] for rank in range(64)]
    assert len(compare(times, ["h"] * 64).ranks) == MAX_SLOWEST


def test_times_are_a_steps_and_start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    times = RankTimes(CPU, 2)
    for _ in range(2):
        with times.timed("data"):
            next(clock)
        with times.timed("compute", on_device=True):
            pass
        times.num_steps += 1
    times.is_paused = True  # an evaluation
    with times.timed("compute"):
        pass
    asked: list[str] = []

    def gather_texts(text: str) -> list[str]:
        asked.append(text)
        return ["a", "b"]

    def gather_figures(own: list[float]) -> list[list[float]]:
        return [own, [9.0, 9.0]]

    found = times.read(gather_texts, gather_figures)
    assert found and found.ranks[1] == {"rank": 0, "host": "a", "seconds": 3.0, "data_seconds": 2.0}
    again = times.read(gather_texts, gather_figures)
    assert again and again.ranks[1]["seconds"] == 0.0 and len(asked) == 1


def test_a_lone_rank_is_compared_with_nobody() -> None:
    times = RankTimes(CPU, 1)
    with times.timed("data"):
        pass
    assert times.read(pytest.fail, pytest.fail) is None


def test_the_report_counts_who_was_slowest() -> None:
    def record(step: int, *seconds: float) -> dict[str, object]:
        ranks = compare([[s / 2, s / 2] for s in seconds], ["a", "b", "c"])
        return {"split": "ranks", "step": step, "median_s": ranks.median_s, "slowest": ranks.ranks}

    rows = tabulate_ranks([record(1, 1, 4, 2), record(2, 1, 6, 2), record(3, 3, 2, 1)])
    assert rows[0] == [1, "b", 2, 4.0, 2.0, 2.0]
    assert [row[0] for row in rows] == [1, 0, 2]
    assert tabulate_ranks([]) == []
