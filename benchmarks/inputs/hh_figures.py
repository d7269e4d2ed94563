"""What the runs on HH-RLHF's pairs recorded, as tables and plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_records(run: Path, split: str) -> list[Record]:
    """Return a run's records of one kind."""
    with (run / "metrics.jsonl").open(encoding="utf-8") as file:
        return [record for record in map(json.loads, file) if record["split"] == split]


def held_out(run: Path) -> list[Record]:
    """Return the figures of every evaluation of a run's only source, with their step."""
    records = read_records(run, "eval")
    return [{"step": r["step"], **figures} for r in records for figures in r["sources"].values()]


def tabulate_reward(rows: Sequence[Record]) -> str:
    """Return a reward model's evaluations as Markdown."""
    lines = ["| step | loss | accuracy | 95 % interval | margin | calibration error | rewards |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        interval = f"{row['accuracy_low']:.1%} to {row['accuracy_high']:.1%}"
        rewards = f"{row['reward_mean']:.2f} ± {row['reward_std']:.2f}"
        lines.append(
            f"| {row['step']} | {row['loss']:.4f} | {row['accuracy']:.1%} | {interval} "
            f"| {row['margin']:.3f} | {row['calibration_error']:.3f} | {rewards} |"
        )
    return "\n".join(lines)


def plot_reward(run: Path, path: Path) -> None:
    """Draw accuracy over steps, and the last distribution of the held-out scores, as SVG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    FigureCanvasSVG(figure)
    left, right = figure.subplots(1, 2)
    rows, train = held_out(run), read_records(run, "train")
    steps = [row["step"] for row in rows]
    low, high = ([100 * row[f"accuracy_{end}"] for row in rows] for end in ("low", "high"))
    left.fill_between(steps, low, high, alpha=0.2, label="95 % interval")
    left.plot(steps, [100 * row["accuracy"] for row in rows], marker="o", label="held-out pairs")
    left.plot(
        [r["step"] for r in train], [100 * r["accuracy"] for r in train], "--", label="training"
    )
    left.axhline(50, color="grey", linewidth=0.8)
    left.set_xlabel("step")
    left.set_ylabel("accuracy, %")
    [histogram] = [p for p in read_records(run, "plot") if p["kind"] == "histogram"][-1:]
    for name, counts in histogram["counts"].items():
        right.stairs(counts, histogram["edges"], fill=True, alpha=0.4, label=name)
    right.set_xlabel("reward, held-out pairs")
    for axes in (left, right):
        axes.legend(fontsize=8)
    with rc_context({"svg.hashsalt": "kuroshio"}):  # the same figures give the same file
        figure.savefig(path, metadata={"Date": None})
