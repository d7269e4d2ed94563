"""Random histories of a run: on how many ranks each of its lives goes on, and how it ends."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

ENDS = {"kill": -9, "kill_in_save": -9, "stop": 75, "finish": 0}
TWISTS = {"kill": "kill_at", "kill_in_save": "kill_in_save", "stop": "signal_at"}
Rows = dict[int, list[tuple[int, ...]]]


@dataclass(frozen=True)
class LifePlan:
    """One life of a run.

    Attributes:
        num_ranks: it runs on.
        zero_stage: of its engine.
        micro_batch_size: rows a rank holds at once.
        save_every: steps between its checkpoints.
        end: how it ends, a key of ``ENDS``.
        at: when: the step (from 0) that is killed or hears of the stop, or (from 1) whose save is
            killed.
        start: step of the checkpoint that it finds.
    """

    num_ranks: int
    zero_stage: int
    micro_batch_size: int
    save_every: int
    end: str
    at: int
    start: int

    def after(self) -> int:
        """Return the step of the newest checkpoint when it has ended."""
        if self.end == "stop":
            return self.at + 1
        last = (self.at - (self.end == "kill_in_save")) // self.save_every * self.save_every
        return max(last, self.start)


def draw_schedule(random: Random, max_steps: int, rows_per_step: int) -> list[LifePlan]:
    """Return three or four lives that bring a run to ``max_steps``."""
    lives: list[LifePlan] = []
    start = 0
    num_lives = random.choice([3, 4])
    while len(lives) < num_lives:
        num_ranks = random.choice([1, 2, 4])
        micro = random.choice([m for m in (1, 2, 4) if m * num_ranks <= rows_per_step])
        zero_stage, save_every = random.choice([1, 2, 3]), random.choice([1, 2, 3])
        is_last = len(lives) == num_lives - 1
        end = _draw_end(random, start, max_steps, save_every, is_last)
        lives.append(LifePlan(num_ranks, zero_stage, micro, save_every, *end, start))
        start = lives[-1].after()
    return lives


def _draw_end(
    random: Random, start: int, max_steps: int, save_every: int, is_last: bool
) -> tuple[str, int]:
    if is_last:
        return "finish", max_steps
    saves = [s for s in range(start + 1, max_steps + 1) if s % save_every == 0]
    end = random.choice(["kill", "stop", "kill_in_save"])
    if end == "kill_in_save" and saves:
        return end, random.choice(saves)
    if end == "stop" and start < max_steps - 1:
        return end, random.randrange(start, max_steps - 1)
    return "kill", random.randrange(start, max_steps)


def describe(schedule: list[LifePlan]) -> str:
    """Return a schedule for people."""
    return " | ".join(
        f"from {life.start}: {life.num_ranks} ranks, ZeRO-{life.zero_stage}, micro "
        f"{life.micro_batch_size}, save every {life.save_every}, {life.end} at {life.at}"
        for life in schedule
    )


def make_life(
    config: dict[str, Any], num_ranks: int, end: str = "finish", at: int = 0, **twist: Any
) -> dict[str, Any]:
    """Return a life for ``run_chains``; it notes what it reads in a file of its own."""
    run_dir = Path(config["run_dir"])
    number = len(list(run_dir.parent.glob(f"{run_dir.name}.read.*")))
    read = run_dir.parent / f"{run_dir.name}.read.{number}"
    read.touch()
    scenario = {"config": config, "read": str(read), "split_everything": True, **twist}
    scenario |= {TWISTS[end]: at} if end in TWISTS else {}
    return {"num_ranks": num_ranks, "scenarios": [scenario], "code": ENDS[end]}


def read_rows(run_dir: Path) -> Rows:
    """Return the rows of each step, over all ranks: of the last life that did the step."""
    steps: Rows = {}
    for number in range(len(list(run_dir.parent.glob(f"{run_dir.name}.read.*")))):
        own: Rows = {}
        for line in (run_dir.parent / f"{run_dir.name}.read.{number}").read_text().splitlines():
            record = json.loads(line)
            own.setdefault(record["step"], []).extend(map(tuple, record["rows"]))
        steps |= own
    return {step: sorted(rows) for step, rows in sorted(steps.items())}
