"""What the files of a run's folder say about it now: read in milliseconds, without torch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import ConfigError
from trainer.heartbeat import Beat, read_life
from trainer.lease import Holder, read_holder
from trainer.lives import CHECKPOINTS_NAME, STOP_NAME, read_lives
from trainer.metrics.history import CONFIG_NAME
from trainer.metrics.journal import JOURNAL_NAME
from trainer.metrics.life import Life, build_life, rank_hours, read_time
from trainer.metrics.tail import Record, read_tail
from trainer.plan.work import Cost

SUBMISSION_NAME = "submit.json"
CLOCK_TOLERANCE_S = 5.0  # a time this far ahead of our clock is called one


@dataclass(frozen=True)
class Saved:
    """The newest committed checkpoint."""

    step: int
    time: float
    is_evaluated: bool  # whether nothing of its step is left to do


@dataclass(frozen=True)
class RunFacts:
    """A run as its files describe it; None is unknown. Times are seconds since the epoch."""

    run_dir: Path
    config: dict[str, Any]
    now: float
    train: Record  # the last training record
    evaluation: Record  # the last evaluation
    last_record: float | None  # time of the last record
    lives: list[Life]
    holder: Holder | None
    saved: Saved | None
    submission: dict[str, Any]
    stop_requested: bool
    problems: list[str]  # files that could not be read, clocks that differ
    ranks: Record  # the last comparison of the ranks
    beats: list[tuple[Beat, float]]  # of the ranks of the life that holds the folder, with when

    @property
    def name(self) -> str:
        """Return the run's name."""
        return str(self.config.get("name") or self.run_dir.name)

    @property
    def stage(self) -> str:
        """Return the stage's name."""
        return str(section(self.config, "stage").get("name") or "")

    @property
    def hours_unit(self) -> str:
        """Return what an hour of a rank is by the profile, which may not know."""
        gpus = section(section(self.config, "cluster"), "site").get("gpus_per_node")
        return "rank-h" if gpus is None else "GPU-h" if gpus else "CPU rank-h"

    @property
    def max_steps(self) -> int | None:
        """Return the step at which the run ends; None when epochs still have to say."""
        return section(self.config, "loop").get("max_steps") or None

    @property
    def step(self) -> int | None:
        """Return the last step that is known to be done."""
        steps = [int(self.train["step"])] if self.train else []
        steps += [self.saved.step] if self.saved else []
        return max(steps, default=None)

    @property
    def is_finished(self) -> bool:
        """Return whether nothing is left to do."""
        if self.saved and self.max_steps:
            return self.saved.step >= self.max_steps and self.saved.is_evaluated
        return bool(self.lives) and self.lives[-1].exit_code == 0

    @property
    def last_sign(self) -> float | None:
        """Return when the run was seen alive at last."""
        signs = [self.last_record, self.saved and self.saved.time]
        signs += [self.holder.heartbeat] if self.holder else []
        return max((sign for sign in signs if sign), default=None)

    def time_left_s(self, is_alive: bool) -> float | None:
        """Return the seconds of training left, by the speed of the last steps.

        Evaluations and saves come on top. A run that lives has gone on since its last record.
        """
        left, written = figure(self.train, "eta_s"), read_time(self.train.get("time"))
        if left is None or written is None or self.is_finished:
            return None
        steps_ahead = (self.step or 0) - int(self.train["step"])
        done = steps_ahead * (figure(self.train, "seconds") or 0.0)
        return max(0.0, left - max(done, self.seconds_since(written) if is_alive else 0.0))

    @property
    def job_ids(self) -> list[str]:
        """Return the Slurm jobs of the run, the newest last."""
        submitted = self.submission.get("job_ids") or []
        jobs = [*map(str, submitted), *(life.job for life in self.lives if life.job)]
        return list(dict.fromkeys(jobs))

    def seconds_since(self, moment: float) -> float:
        """Return the time passed since ``moment``; a clock ahead of ours counts as now."""
        return max(0.0, self.now - moment)

    def rank_hours(self, is_alive: bool) -> tuple[float, bool]:
        """Return hours times ranks spent so far, and False when it is a lower bound."""
        return rank_hours(self.lives, self.now if is_alive else self.last_sign)

    def costs(self, hours: float) -> list[Cost]:
        """Return the price of ``hours`` GPU-hours by the profile's rates, empty when unknown."""
        prices = section(section(self.config, "cluster"), "site").get("prices") or []
        return [
            Cost(
                str(price["who"]),
                str(price["currency"]),
                hours * float(price["per_gpu_hour"]),
                str(price["source"]),
                None if price["date"] is None else str(price["date"]),
            )
            for price in prices
        ]


def section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a section of a config, empty when it is absent."""
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def figure(record: Record, key: str) -> float | None:
    """Return a finite number of a record; the journal writes NaN as a word."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def read_run(run_dir: Path, now: float | None = None) -> RunFacts:
    """Read what a run's folder says, whatever state it is in.

    Raises:
        ConfigError: when the folder is not a run's.
    """
    now = time.time() if now is None else now
    if not (run_dir / CONFIG_NAME).is_file() and not (run_dir / JOURNAL_NAME).is_file():
        raise ConfigError(
            f"{run_dir} is not the folder of a run: it has neither {CONFIG_NAME} nor "
            f"{JOURNAL_NAME}; give the run_dir that `kuroshio run` or `kuroshio submit` printed"
        )
    problems: list[str] = []
    config = _read_mapping(run_dir / CONFIG_NAME, _parse_yaml, problems)
    records = read_tail(run_dir / JOURNAL_NAME, _has_step)
    times = [moment for record in records if (moment := read_time(record.get("time")))]
    holder = _read_holder(run_dir, problems)
    facts = RunFacts(
        run_dir=run_dir,
        config=config,
        now=now,
        train=_last(records, "train"),
        evaluation=_last(records, "eval"),
        last_record=max(times, default=None),
        lives=[build_life(record) for record in read_lives(run_dir)],
        holder=holder,
        saved=_newest_checkpoint(run_dir / CHECKPOINTS_NAME),
        submission=_read_mapping(run_dir / SUBMISSION_NAME, json.loads, problems),
        stop_requested=(run_dir / STOP_NAME).exists(),
        problems=problems,
        ranks=_last(records, "ranks"),
        beats=read_life(run_dir, holder.token) if holder and not holder.has_ended else [],
    )
    ahead = (facts.last_sign or now) - now
    if ahead > CLOCK_TOLERANCE_S:
        host = holder.host if holder else facts.lives[-1].host if facts.lives else "its machine"
        problems.append(
            f"the newest sign of life is {ahead:.0f} s in the future: the clock of {host}, of the "
            "file system or of this machine is wrong; ages and ETA are too"
        )
    return facts


def _has_step(records: list[Record]) -> bool:
    return any(record.get("split") == "train" for record in records)


def _last(records: list[Record], split: str) -> Record:
    found = (r for r in reversed(records) if r.get("split") == split and "step" in r)
    return next(found, {})


@lru_cache(maxsize=1024)
def _parse_yaml(text: str) -> Any:
    """Parse a config once, however often its run is looked at: that is most of a look's time."""
    return yaml.safe_load(text)


def _read_mapping(path: Path, parse: Any, problems: list[str]) -> dict[str, Any]:
    """Return the mapping in a file, empty when there is none; a broken file is a problem."""
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        problems.append(f"{path} cannot be read: {str(error).splitlines()[0]}")
        return {}
    if not isinstance(values, dict):
        problems.append(f"{path} holds no mapping but {type(values).__name__}")
        return {}
    return values


def _read_holder(run_dir: Path, problems: list[str]) -> Holder | None:
    try:
        holder = read_holder(run_dir)
    except OSError as error:
        problems.append(f"the lease of {run_dir} cannot be read: {error}")
        return None
    if holder and holder.damage:
        problems.append(f"the lease of {run_dir} cannot be read: {holder.damage}")
    return holder


def _newest_checkpoint(folder: Path) -> Saved | None:
    """Return the newest checkpoint whose manifest can be read."""
    names = sorted((p for p in folder.glob("step_*") if p.name[5:].isdigit()), reverse=True)
    for path in names:
        manifest = path / "manifest.json"
        try:
            state = json.loads(manifest.read_text(encoding="utf-8"))["state"]
            is_evaluated = bool(state.get("evaluated"))
            return Saved(int(path.name[5:]), manifest.stat().st_mtime, is_evaluated)
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
            continue  # damaged, or deleted by the run's rotation this moment
    return None
