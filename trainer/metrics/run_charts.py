"""The charts of a run: its training and held-out figures over steps, and drawings of scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from trainer.metrics.charts import (
    Axis,
    Curve,
    Mark,
    draw_calibration,
    draw_chart,
    draw_histogram,
    smooth,
)
from trainer.metrics.formats import show_number, show_share
from trainer.metrics.history import Record, Run

# Key of a training record, title, how its axis reads, whether it is noisy and wants smoothing.
TRAIN_CHARTS: tuple[tuple[str, str, Axis, bool], ...] = (
    ("accuracy", "Accuracy in training", "percent", True),
    ("margin", "Margin in training", "plain", True),
    ("reward", "Reward of a response", "plain", True),
    ("kl", "KL from the reference (nats a response)", "plain", True),
    ("kl_coef", "Price of KL", "plain", False),
    ("entropy", "Entropy (nats a token)", "plain", True),
    ("response_length", "Length of a response (tokens)", "plain", True),
    ("eos_share", "Responses that ended by themselves", "percent", True),
    ("flat_share", "Prompts whose responses all score the same", "percent", True),
    ("clip_fraction", "Tokens with a clipped ratio", "percent", True),
    ("value_clip_fraction", "Tokens with a clipped value", "percent", True),
    ("explained_variance", "Variance of returns that the critic explains", "percent", True),
    ("rollout_seconds", "Rollout (seconds a step)", "plain", True),
    ("score_seconds", "Scoring (seconds a step)", "plain", True),
    ("update_seconds", "Update (seconds a step)", "plain", True),
    ("lr", "Learning rate", "plain", False),
    ("grad_norm", "Gradient norm", "plain", True),
    ("largest_grad_norm", "Largest gradient norm between two records", "plain", False),
    ("tokens_per_s", "Throughput (tokens per second)", "count", True),
    ("slowest_rank_delay_s", "Slowest rank over the median (seconds a step)", "plain", True),
    ("memory_gib", "Peak memory of rank 0 (GiB)", "plain", False),
    ("mfu", "Model FLOPs utilisation", "percent", True),
    ("loss_scale", "Loss scale", "log", False),
)
# Key of an evaluation, title, how its axis reads.
EVAL_CHARTS: tuple[tuple[str, str, Axis], ...] = (
    ("bits_per_character", "Bits per character, held-out", "plain"),
    ("perplexity", "Perplexity per token, held-out", "log"),
    ("accuracy", "Accuracy, held-out", "percent"),
    ("margin", "Margin, held-out", "plain"),
    ("calibration_error", "Calibration error, held-out", "plain"),
    ("reward", "Reward, held-out", "plain"),
    ("kl", "KL from the reference, held-out (nats a response)", "plain"),
    ("response_length", "Length of a response, held-out (tokens)", "plain"),
)
# Event -> what a mark of it on the loss means, and its colour.
MARKS = {"skip": ("a skipped step", 5), "roll_back": ("rolled back to this step", 1)}


@dataclass(frozen=True)
class Chart:
    """A chart and what is written under it."""

    title: str
    svg: Markup
    legend: list[tuple[str, int]]  # name of a curve or mark, colour
    caption: str


def draw_charts(run: Run) -> list[Chart]:
    """Draw what is recorded: the loss, the held-out curves, then every other figure."""
    return [
        *_draw_train_chart(run, "loss", "Training loss", "plain", True),
        *map(_draw_plot, run.plots),
        *(chart for row in EVAL_CHARTS for chart in _draw_eval_chart(run, *row)),
        *(chart for row in TRAIN_CHARTS for chart in _draw_train_chart(run, *row)),
    ]


def _draw_train_chart(run: Run, key: str, title: str, axis: Axis, noisy: bool) -> list[Chart]:
    """Draw one figure of the training records, or nothing where it is not recorded."""
    steps, values, num_lost = series(run.train, key)
    if not steps:
        return []
    curves = [Curve(steps, values, faint=noisy)]
    marks, legend = _mark_events(run) if key == "loss" else ([], [])
    if noisy:
        curves.append(Curve(steps, smooth(values)))
    show = show_share if axis == "percent" else show_number
    low, high, last = map(show, (min(values), max(values), values[-1]))
    caption = f"last {last} · lowest {low} · highest {high}"
    if num_lost:
        caption += f" · {num_lost} not finite"
    # The SVG is our own and holds no text of the run's.
    return [Chart(title, Markup(draw_chart(key, curves, axis, marks)), legend, caption)]


def _mark_events(run: Run) -> tuple[list[Mark], list[tuple[str, int]]]:
    """Return the steps at which the guards did something, and what their colours mean."""
    found = {name: [e["step"] for e in run.events if e.get("event") == name] for name in MARKS}
    marks = [Mark(step, MARKS[name][1]) for name, steps in found.items() for step in set(steps)]
    return marks, [MARKS[name] for name, steps in found.items() if steps]


def _draw_eval_chart(run: Run, key: str, title: str, axis: Axis) -> list[Chart]:
    """Draw one held-out figure, a colour for each source."""
    curves, legend = [], []
    for colour, name in enumerate(source_names(run)):
        rows = [
            {"step": record["step"], **record["sources"][name]}
            for record in run.evals
            if name in record["sources"]
        ]
        steps, values, _ = series(rows, key)
        if steps:
            curves.append(Curve(steps, values, marked=True, colour=colour))
            legend.append((name, colour))
    return [Chart(title, Markup(draw_chart(key, curves, axis)), legend, "")] if curves else []


def _draw_plot(record: Record) -> Chart:
    """Draw a recorded plot, a histogram's ``edges`` and ``counts`` or a calibration's ``bins``."""
    title, at = record["title"], f"step {record['step']}"
    if record["kind"] == "histogram":
        groups = record["counts"]
        svg = draw_histogram(title, record["edges"], list(groups.values()))
        return Chart(title, Markup(svg), [(name, i) for i, name in enumerate(groups)], at)
    bins = record["bins"]
    svg = draw_calibration(title, *([b[key] for b in bins] for key in ("confidence", "accuracy")))
    sizes = ", ".join(f"{b['num']:,}" for b in bins)
    return Chart(title, Markup(svg), [], f"{at} · pairs in the bins: {sizes}")


def series(records: Sequence[Record], key: str) -> tuple[list[int], list[float], int]:
    """Return steps and finite values of ``key``, and how many values were not finite."""
    points = [(record["step"], float(record[key])) for record in records if key in record]
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite], len(points) - len(finite)


def source_names(run: Run) -> list[str]:
    """Return the evaluated sources in order of appearance."""
    return list(dict.fromkeys(name for record in run.evals for name in record["sources"]))
