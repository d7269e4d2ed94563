"""A run's plan beside what the run took."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.lives import CHECKPOINTS_NAME
from trainer.metrics.console import show_count, show_duration
from trainer.metrics.history import Run
from trainer.metrics.meters import GIB
from trainer.metrics.run_facts import RunFacts, figure

GB = 1e9
# What was planned, what it took, and the second over the first; "" where one of them is unknown.
ComparedRow = tuple[str, str, str, str]


def compare_plan(run: Run, facts: RunFacts, plan: Mapping[str, Any] | None) -> list[ComparedRow]:
    """Return planned and measured figures side by side; empty without a plan.

    Args:
        run: its records.
        facts: its lives and checkpoints.
        plan: ``RunPlan.as_dict()``; None takes the one made at submission.
    """
    planned = dict(plan or facts.submission.get("plan") or {})
    if not planned:
        return []
    on_gpu = str(run.event("environment").get("device", "")).startswith("cuda")
    last = run.train[-1] if run.train else {}
    steps = [figure(record, "seconds") for record in run.train[1:]]
    seconds = [value for value in steps if value is not None]
    # Resident memory of a process on a CPU is no measure of what was planned.
    memory = figure(last, "memory_gib") if on_gpu else None
    hours, is_whole = facts.rank_hours(is_alive=False)
    of_all = hours if is_whole and facts.is_finished else None
    ranks = figure(planned, "num_gpus") or 1.0
    rows = (
        ("Step", "step_seconds", statistics.median(seconds) if seconds else None, _show_seconds),
        ("Tokens/s", "tokens_per_s", figure(last, "tokens_per_s_overall"), show_count),
        ("Memory of a GPU", "peak_bytes", memory and memory * GIB, _show_gb),
        ("Checkpoint", "checkpoint_bytes", _checkpoint_bytes(run.run_dir), _show_gb),
        ("Hours", "hours", of_all and of_all / ranks, lambda h: show_duration(h * 3600)),
        ("GPU-hours", "gpu_hours", of_all, lambda h: f"{h:,.2f}"),
    )
    found = []
    for label, key, measured, show in rows:
        before = figure(planned, key)
        ratio = f"{measured / before:.2f}" if before and measured else ""
        texts = ["" if value is None else show(value) for value in (before, measured)]
        found.append((label, texts[0], texts[1], ratio))
    return [row for row in found if row[1] or row[2]]


def _checkpoint_bytes(run_dir: Path) -> float | None:
    """Return the bytes of the newest checkpoint's weights and moments."""
    folders = sorted((run_dir / CHECKPOINTS_NAME).glob("step_*"))
    files = folders[-1].glob("rank_*.safetensors") if folders else ()
    return float(sum(path.stat().st_size for path in files)) or None


def _show_seconds(seconds: float) -> str:
    return f"{seconds:.3g} s"


def _show_gb(size: float) -> str:
    return f"{size / GB:,.2f} GB"
