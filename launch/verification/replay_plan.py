"""Which steps of a run can be done again and compared, from which checkpoint, on how many ranks."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.verification.records import Span, read_spans
from trainer.config import grad_accum_steps, load_config
from trainer.engine.manifest import list_steps
from trainer.errors import ConfigError
from trainer.lives import CHECKPOINTS_NAME, Life, read_lives
from trainer.metrics.journal import JOURNAL_NAME, read_lines
from trainer.stages import SINGLE_PROCESS

SAVES_KEPT = 4  # of a replay: the one in the middle and the one at its end among them


@dataclass(frozen=True)
class Plan:
    """What to replay.

    Attributes:
        start: step to begin from.
        checkpoint: of that step; None: the beginning of the run.
        spans: recorded ones that the replay has to reproduce, in order.
        middle: step at which the first replay saves and the second begins; None: too few spans.
        life: the run's, in which these steps were done.
    """

    start: int
    checkpoint: Path | None
    spans: list[Span]
    middle: int | None
    life: Life

    @property
    def end(self) -> int:
        """Return the last step to replay."""
        return self.spans[-1].end

    @property
    def log_every(self) -> int:
        """Return the period of the records that are compared."""
        return max(span.end - span.start for span in self.spans)

    def config(self, values: Mapping[str, Any], num_ranks: int) -> dict[str, Any]:
        """Return the run's config as the replay needs it: only what no result depends on differs.

        Args:
            values: the frozen config.
            num_ranks: of this machine.
        """
        changed = copy.deepcopy(dict(values))
        loop = {"log_every": self.log_every, "save_every": self.middle or self.end}
        changed["loop"] |= loop | {"keep_last": SAVES_KEPT, "keep_every": 0}
        changed["log"] = {**(values.get("log") or {}), "wandb": "off", "tensorboard": False}
        changed["cluster"] |= {"nodes": 1, "gpus_per_node": num_ranks}
        return changed


def plan_replay(run_dir: Path, num_steps: int, step: int | None) -> Plan:
    """Choose what to replay.

    Args:
        run_dir: the run's folder.
        num_steps: at least so many steps, rounded up to whole records.
        step: of the checkpoint to begin from, 0 for the start; None: the newest after which
            ``num_steps`` were recorded, else the newest after which any was.

    Raises:
        ConfigError: there is no such checkpoint, or no record to compare with.
    """
    spans = read_spans(read_lines(run_dir / JOURNAL_NAME))
    saved = {int(path.name[5:]): path for path in list_steps(run_dir / CHECKPOINTS_NAME)}
    starts = [*saved, 0] if step is None else [step]
    if step and step not in saved:
        there = ", ".join(map(str, saved)) or "none"
        raise ConfigError(f"--step {step}: {run_dir} has no checkpoint of it; there are {there}")
    windows = {start: choose_spans(spans, start, num_steps) for start in starts}
    whole = [s for s, window in windows.items() if window and window[-1].end - s >= num_steps]
    some = [start for start, window in windows.items() if window]
    if not some:
        raise ConfigError(
            f"{run_dir} recorded no step after {' or '.join(map(str, starts))} in full, so there "
            "is nothing to compare a replay with"
            + ("; leave --step out to begin at an earlier checkpoint" if step else "")
        )
    start = (whole or some)[0]
    window = windows[start]
    return Plan(
        start, saved.get(start), window, choose_middle(start, window, saved), _life(run_dir, start)
    )


def choose_spans(spans: Sequence[Span], start: int, num_steps: int) -> list[Span]:
    """Return the spans from ``start`` on: up to ``num_steps`` later, and at least two if there are.

    A span that began before ``start`` sums up steps which a replay from there does not do.
    """
    after = [span for span in spans if span.start >= start]
    enough = next((i for i, s in enumerate(after, 1) if s.end >= start + num_steps), len(after))
    return after[: max(2, enough)]


def choose_middle(start: int, spans: Sequence[Span], saved: Mapping[int, Path]) -> int | None:
    """Return where to save and begin again: at a checkpoint of the run, else half-way."""
    if len(spans) < 2:
        return None
    wanted = (start + spans[-1].end) / 2
    inside = [s for s in saved if start < s <= spans[-1].start]
    return min(inside or [s.end for s in spans[:-1]], key=lambda step: abs(step - wanted))


def settle_ranks(plan: Plan, values: Mapping[str, Any], asked: int | None, present: int) -> int:
    """Return on how many ranks to replay: as many as the run had, or the most that fit here.

    Args:
        plan: of the replay.
        values: the frozen config.
        asked: by the user.
        present: GPUs, or cores where there are none.

    Raises:
        ConfigError: the run has no ranks, or not so many divide its batch.
    """
    if (values.get("stage") or {}).get("name") in SINGLE_PROCESS:
        raise ConfigError("--replay: the stage vocab has no steps; its files are checked without")
    wanted = asked or plan.life.get("world_size") or 1
    most = wanted if asked else max(1, min(wanted, present))
    for num_ranks in [most] if asked else range(most, 0, -1):
        config = load_config(plan.config(values, num_ranks))
        try:
            grad_accum_steps(config, num_ranks)
            return num_ranks
        except ConfigError:
            if num_ranks == 1 or asked:
                raise
    raise AssertionError("one rank was tried")


def num_cores() -> int:
    """Return the cores of this machine that the replay may use."""
    return len(os.sched_getaffinity(0))


def _life(run_dir: Path, start: int) -> Life:
    """Return the life in which the steps after ``start`` were done: the last to begin by then."""
    lives = [life for life in read_lives(run_dir) if isinstance(life.get("first_step"), int)]
    return next((life for life in reversed(lives) if life["first_step"] <= start), {})
