"""Random schedules of kills, stops, ranks and ZeRO stages end as the unbroken run does."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from life_schedules import LifePlan, Rows, describe, draw_schedule, make_life, read_rows
from training_fixtures import varying, write_mixture
from training_support import ROOT, read_losses, run_chains

from trainer.config import load_config
from trainer.data.batches.loader import make_mixture, make_rows
from trainer.data.prepared.prepare import open_store

MAX_STEPS, ROWS_PER_STEP = 8, 8
SCHEDULES = [draw_schedule(Random(seed), MAX_STEPS, ROWS_PER_STEP) for seed in range(20)]
Vary = Callable[..., dict[str, Any]]


@pytest.fixture
def vary_mixture(base_config: dict[str, Any], tmp_path: Path) -> Vary:
    """Return varied configs on a mixture of two sources, the smaller read several times."""
    lines = (ROOT / "samples/en.jsonl").read_text(encoding="utf-8").splitlines()
    values = copy.deepcopy(base_config)
    values["data"] |= {"holdout_share": 0.0}
    write_mixture(values, tmp_path, {"few": (lines[:5], 3.0), "many": (lines[5:60], 2.0)})
    return varying(values)


def make_chain(vary: Vary, run_dir: Path, schedule: list[LifePlan]) -> list[dict[str, Any]]:
    return [
        make_life(
            vary(
                run_dir,
                loop__max_steps=MAX_STEPS,
                loop__save_every=life.save_every,
                loop__micro_batch_size=life.micro_batch_size,
                engine__zero_stage=life.zero_stage,
            ),
            life.num_ranks,
            life.end,
            life.at,
        )
        for life in schedule
    ]


def test_the_schedules_are_a_fair_draw() -> None:
    """Every number of ranks, ZeRO stage and end is there, and every change of ranks."""
    lives = [life for schedule in SCHEDULES for life in schedule]
    assert {(life.num_ranks, life.zero_stage) for life in lives} == {
        (ranks, stage) for ranks in (1, 2, 4) for stage in (1, 2, 3)
    }
    pairs = {
        (old.num_ranks, new.num_ranks)
        for schedule in SCHEDULES
        for old, new in itertools.pairwise(schedule)
        if new.start  # with something to load
    }
    assert pairs == {(old, new) for old in (1, 2, 4) for new in (1, 2, 4)}
    assert {life.end for life in lives} == {"kill", "kill_in_save", "stop", "finish"}
    assert sum(life.start > 0 for life in lives) > 20


@pytest.mark.slow
@pytest.mark.faults(row=12)
@pytest.mark.faults(row=14)
def test_random_schedules_equal_the_unbroken_run(vary_mixture: Vary, tmp_path: Path) -> None:
    unbroken = [LifePlan(1, 1, 2, 9, "finish", MAX_STEPS, 0)]
    runs = {"unbroken": unbroken} | {f"run_{n:02}": s for n, s in enumerate(SCHEDULES)}
    chains = [make_chain(vary_mixture, tmp_path / name, s) for name, s in runs.items()]
    problems = run_chains(chains, tmp_path)
    assert not problems, "\n".join(problems)
    losses, rows = read_losses(tmp_path / "unbroken"), read_rows(tmp_path / "unbroken")
    assert losses.keys() == set(range(1, MAX_STEPS + 1))
    check_reading(rows, chains[0][0]["scenarios"][0]["config"])
    furthest = {}
    for name, schedule in runs.items():
        assert read_rows(tmp_path / name) == rows, describe(schedule)
        own = read_losses(tmp_path / name)
        assert own.keys() == losses.keys(), describe(schedule)
        furthest[name] = max(abs(own[step] - losses[step]) for step in losses)
        assert furthest[name] < 1e-5, f"{furthest[name]:.2g} apart: {describe(schedule)}"
    print(f"furthest from the unbroken run: {max(furthest.values()):.2g}")


def check_reading(rows: Rows, config: dict[str, Any]) -> None:
    """Check that the unbroken run read each row number once, and its sources several times."""
    numbers = [number for step in range(MAX_STEPS) for number, _, _ in rows[step]]
    assert numbers == list(range(MAX_STEPS * ROWS_PER_STEP))
    built = load_config(config)
    store = open_store(built.data, str(built.tokenizer.path))
    streams = make_rows(store, built.data, built.loop.seed)
    passes = make_mixture(streams, built.data, built.loop.seed).epochs_at(len(numbers))
    assert passes["few"] > 3 and 0.1 < passes["many"] < 2
