"""What a run wrote down: config, lives, leases, figures. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from launch import run_folder
from launch.verification.check import Check, ok, problem, unchecked
from trainer.config import load_config
from trainer.errors import CheckpointError, ConfigError
from trainer.lease import LEASES_NAME, Holder
from trainer.lives import LIVES_NAME, read_lives
from trainer.metrics.journal import JOURNAL_NAME, read_lines

Record = dict[str, Any]
LOSSES = ("loss", "policy_loss", "value_loss")  # a norm may overflow in a step that was skipped
SHOWN = 5  # of a list of steps


def check_config(run_dir: Path) -> tuple[dict[str, Any], Check]:
    """Return the frozen config, empty when it cannot be read, and what is wrong with it."""
    path, remedy = run_dir / run_folder.CONFIG_FILE, "bring back the file as the run wrote it"
    try:
        values = run_folder.read(path)
    except CheckpointError as error:
        return {}, problem("config", str(error), remedy)
    try:
        load_config(values)
    except ConfigError as error:
        return values, problem("config", f"{path.name}: {error}", remedy)
    started = [life for life in read_lives(run_dir) if life.get("config")]
    if started and started[-1]["config"] != run_folder.identify(values):
        what = f"{path.name} was changed in what decides the result since life {len(started)}"
        return values, problem("config", what, remedy)
    frozen = "as its last life froze it" if started else "its lives noted no hash to compare with"
    return values, ok("config", f"{path.name} builds, {frozen}")


def num_torn(path: Path) -> tuple[int, bool]:
    """Return how many lines are no JSON objects, and whether the last is the only one."""
    torn = []
    with path.open("rb") as file:
        lines = list(file)
    for number, line in enumerate(lines):
        try:
            whole = isinstance(json.loads(line), dict)
        except (ValueError, RecursionError):
            whole = not line.strip()
        if not whole:
            torn.append(number)
    return len(torn), torn == [len(lines) - 1]


def check_lives(run_dir: Path, is_alive: bool) -> Check:
    """Compare the lives with each other."""
    path, remedy = run_dir / LIVES_NAME, f"bring {LIVES_NAME} back from a copy"
    if not path.is_file():
        return problem("lives", f"there is no {LIVES_NAME}", remedy)
    torn, _ = num_torn(path)
    lives = [life for life in read_lives(run_dir) if "started" in life]
    tokens = [life["token"] for life in lives if isinstance(life.get("token"), int)]
    if not lives:
        return problem("lives", f"{LIVES_NAME} tells of no life", remedy)
    if tokens != sorted(set(tokens)):
        return problem(
            "lives", f"the lives' numbers are {tokens}: one is missing or double", remedy
        )
    endless = sum("ended" not in life for life in lives) - is_alive
    words = [f"{len(lives)} started"]
    words += [f"{endless} ended without a word (killed, or lost)"] if endless > 0 else []
    words += [f"{torn} torn lines"] if torn else []
    return ok("lives", ", ".join(words))


def check_lease(run_dir: Path, holder: Holder | None, is_alive: bool) -> Check:
    """Say who owns the folder."""
    if holder is None:
        return unchecked("lease", "nobody ever took the folder")
    if holder.damage:
        return problem(
            "lease",
            f"{LEASES_NAME}/{holder.token:05d}.json cannot be read: {holder.damage}",
            "the next life takes a higher number; nothing to do unless a rank still writes",
        )
    if is_alive:
        return unchecked("lease", f"life {holder.token} on {holder.host} has the folder now")
    how = "ended" if holder.has_ended else "is gone without a word"
    return ok("lease", f"life {holder.token} {how}")


@dataclass(frozen=True)
class Span:
    """Steps (start, end] that one training record sums up."""

    start: int
    end: int
    record: Record


def read_spans(records: Iterable[Record]) -> list[Span]:
    """Return which steps each training record is of: those since the record, or start, before."""
    spans, since = [], 0
    for record in records:
        step = record.get("step")
        if not isinstance(step, int):
            continue
        if record.get("split") == "train":
            spans.append(Span(since, step, record))
            since = step
        elif record.get("event") == "resume":
            since = step
    return spans


def check_metrics(run_dir: Path, config: Mapping[str, Any], saved: int) -> Check:
    """Look for torn lines, steps that are missing or double, and figures that are no numbers.

    Args:
        run_dir: the run's folder.
        config: its frozen config.
        saved: step of the newest checkpoint; every step before it was recorded.
    """
    path, remedy = run_dir / JOURNAL_NAME, f"bring {JOURNAL_NAME} back from a copy"
    if not path.is_file():
        if saved:
            return problem("metrics", f"there is no {JOURNAL_NAME}", remedy)
        return unchecked("metrics", f"there is no {JOURNAL_NAME} yet")
    torn, only_last = num_torn(path)
    spans = read_spans(read_lines(path))
    wrong = list(_contradictions(spans, log_every(run_dir, config), saved))
    if torn and not only_last:
        wrong.append(f"{torn} lines in the middle are no JSON")
    if wrong:
        return problem("metrics", f"{JOURNAL_NAME}: {'; '.join(wrong)}", remedy)
    last = f", steps up to {spans[-1].end}" if spans else ""
    words = ", its last line torn by a kill" if torn else ""
    return ok("metrics", f"{len(spans)} training records{last}, without gaps{words}")


def log_every(run_dir: Path, config: Mapping[str, Any]) -> int:
    """Return the longest period between records that a life of the run had."""
    periods = [(config.get("loop") or {}).get("log_every")]
    for life in read_lives(run_dir):
        changes = life.get("changes")
        periods += (changes.get("loop.log_every") or []) if isinstance(changes, dict) else []
    return max((p for p in periods if isinstance(p, int)), default=0)


def _contradictions(spans: Sequence[Span], every: int, saved: int) -> Iterator[str]:
    ends = [span.end for span in spans]
    double = [end for before, end in pairwise(ends) if end <= before]
    if double:
        yield f"step {_list(double)} is double or out of order"
    gaps = [f"{a + 1}-{b - 1}" for a, b in pairwise([0, *ends]) if every < b - a]
    if gaps and every:
        yield f"steps {_list(gaps)} are not recorded"
    if every and saved - (ends[-1] if ends else 0) >= every:
        last = ends[-1] if ends else 0
        yield f"the last record is of step {last}, but a checkpoint of step {saved} is there"
    for key in LOSSES:
        bad = [s.end for s in spans if not _is_finite(s.record.get(key, 0.0))]
        if bad:
            yield f"{key} is no finite number at step {_list(bad)}"


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _list(found: Sequence[Any]) -> str:
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(map(str, found[:SHOWN])) + more
