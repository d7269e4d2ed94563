"""What runs of PPO recorded, as a table and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from benchmarks.inputs.hh_figures import Record, held_out, read_records

NUM_STEPS = 5  # at the start and at the end of a run, of which means are taken


def tabulate_ppo(runs: Sequence[Path]) -> str:
    """Return reward, KL and length of runs at their start and end, in training and held out."""
    lines = [
        "| run | reward | KL | length | held-out reward | held-out KL |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs:
        train, rows = read_records(run, "train"), held_out(run)
        cells = [_change(train, key) for key in ("reward", "kl", "response_length")]
        cells += [f"{rows[0][key]:.3f} → {rows[-1][key]:.3f}" for key in ("reward", "kl")]
        lines.append(f"| {run.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _change(train: Sequence[Record], key: str) -> str:
    first, last = (mean(r[key] for r in part) for part in (train[:NUM_STEPS], train[-NUM_STEPS:]))
    return f"{first:.3f} → {last:.3f}"


def plot_ppo(runs: Sequence[Path], target: float, path: Path) -> None:
    """Draw reward and KL of runs over steps, training thin and held out thick, as SVG.

    Args:
        runs: folders of runs that differ in their seed.
        target: of KL, nats a response.
        path: of the picture.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    FigureCanvasSVG(figure)
    for axes, key, title in zip(
        figure.subplots(1, 2), ("reward", "kl"), ("reward", "KL, nats a response"), strict=True
    ):
        for number, run in enumerate(runs):
            train, rows = read_records(run, "train"), held_out(run)
            steps, values = [r["step"] for r in train], [r[key] for r in train]
            axes.plot(steps, values, color=f"C{number}", linewidth=0.6, alpha=0.6)
            steps, values = [r["step"] for r in rows], [r[key] for r in rows]
            axes.plot(steps, values, color=f"C{number}", marker="o", label=run.name)
        axes.set_xlabel("step")
        axes.set_ylabel(title)
    axes.axhline(target, color="grey", linewidth=0.8, label="target")
    axes.legend(fontsize=8)
    with rc_context({"svg.hashsalt": "kuroshio"}):  # the same figures give the same file
        figure.savefig(path, metadata={"Date": None})
