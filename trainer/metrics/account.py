"""What a run took: its jobs, hours, money and lives, as tables for a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.metrics.console import show_duration
from trainer.metrics.formats import show_setting, show_time
from trainer.metrics.life import Life
from trainer.metrics.run_facts import RunFacts, figure

WANDB_RUNS = "wandb/offline-run-*"
LIFE_COLUMNS = (
    "started",
    "host",
    "job",
    "launcher",
    "ranks",
    "steps",
    "resumed",
    "lasted",
    "ended",
    "changes",
)


def summarise_jobs(facts: RunFacts, time_limit: float | None = None) -> list[tuple[str, str]]:
    """Return jobs, time left, checkpoint, hours and cost as label and value, those that are known.

    Args:
        facts: what the run's files say.
        time_limit: when its last job ends, in seconds since the epoch.
    """
    rows = [("Slurm jobs", ", ".join(facts.job_ids))] if facts.job_ids else []
    if facts.submission.get("cluster"):
        rows.append(("Cluster", str(facts.submission["cluster"])))
    # Whether it lives is not asked here: an end that is not recorded was at the last sign of life.
    if (left := facts.time_left_s(is_alive=False)) is not None:
        rows.append(("Training left", show_duration(left)))
        if time_limit is not None and time_limit > facts.now:
            rows.append(("Time left to its job", show_duration(time_limit - facts.now)))
    if facts.saved:
        rows.append(("Last checkpoint", f"step {facts.saved.step}, {show_time(facts.saved.time)}"))
    if not facts.lives:
        return rows
    hours, is_whole = facts.rank_hours(is_alive=False)
    more = "" if is_whole else "at least "
    rows.append(("Spent", f"{more}{hours:,.2f}{_planned(facts)} {facts.hours_unit}"))
    for cost in facts.costs(hours):
        source = ", ".join(filter(None, (cost.source, cost.date)))
        amount = f"{more}{cost.currency} {cost.amount:,.2f} ({source})"
        rows.append((f"Cost, {cost.who}", amount))
    return rows


def planned_gpu_hours(facts: RunFacts) -> float | None:
    """Return the GPU-hours that the plan made at submission foresaw."""
    plan = facts.submission.get("plan")
    return figure(plan, "gpu_hours") if isinstance(plan, dict) else None


def tabulate_lives(
    records: Sequence[Mapping[str, Any]],
    lives: Sequence[Life],
    events: Sequence[Mapping[str, Any]] = (),
) -> list[list[Any]]:
    """Return a row of ``LIFE_COLUMNS`` for each life: its lines and what follows from them.

    Args:
        records: lines of the lives.
        lives: made of them.
        events: of the run's journal, which know what each resume took.
    """
    resumes = {event.get("life"): event for event in events if event.get("event") == "resume"}
    return [
        _life_row(record, life, resumes.get(record.get("token"), {}))
        for record, life in zip(records, lives, strict=True)
    ]


def wandb_lines(run_dir: Path) -> list[str]:
    """Return the commands that send what wandb recorded offline."""
    return [f"wandb sync {path}" for path in sorted(run_dir.glob(WANDB_RUNS)) if not _is_sent(path)]


def _is_sent(folder: Path) -> bool:
    """Return whether ``wandb sync`` left its mark beside every record."""
    records = list(folder.glob("*.wandb"))
    return bool(records) and all(record.with_suffix(".wandb.synced").exists() for record in records)


def _planned(facts: RunFacts) -> str:
    planned = planned_gpu_hours(facts)
    return "" if planned is None else f" of {planned:,.2f} planned"


def describe_resume(event: Mapping[str, Any]) -> str | None:
    """Return from what, on what and how long a life took to resume; None where nobody noted it."""
    if "seconds" not in event:
        return None
    return "{of} on {on}: {gb_read} GB in {seconds} s".format_map(event)


def _describe_start(life: Life) -> str:
    """Return how often a job was started before this life, empty for its first one."""
    counts = {"restart": life.restart, "attempt": life.attempt}
    words = ", ".join(f"{word} {count}" for word, count in counts.items() if count)
    return f" ({words})" if words else ""


def _life_row(record: Mapping[str, Any], life: Life, resume: Mapping[str, Any]) -> list[Any]:
    seconds = life.seconds(None)
    steps = [str(step) for step in (record.get("first_step"), life.step) if step is not None]
    changes = record.get("changes")
    words = [
        f"{key}: {' → '.join(map(show_setting, pair))}"
        for key, pair in (changes.items() if isinstance(changes, Mapping) else ())
        if isinstance(pair, list)
    ]
    return [
        record.get("started"),
        life.host or None,
        life.job and life.job + _describe_start(life),
        life.launcher or None,
        life.world_size,
        " → ".join(steps) or None,
        describe_resume(resume) if life.started is not None else None,
        None if seconds is None else show_duration(seconds),
        life.why or None,
        "; ".join(words) or None,
    ]
