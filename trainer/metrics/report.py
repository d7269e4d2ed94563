"""A run as one self-contained HTML page, made from its folder alone."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from trainer.errors import StorageError
from trainer.metrics.charts import Axis, Curve, draw_chart, smooth
from trainer.metrics.console import show_count, show_duration
from trainer.metrics.history import RECORD_KEYS, Record, Run, load_run

TEMPLATE = "report.html.j2"

# Key of a training record, title, how its axis reads, whether it is noisy and wants smoothing.
TRAIN_CHARTS: tuple[tuple[str, str, Axis, bool], ...] = (
    ("lr", "Learning rate", "plain", False),
    ("grad_norm", "Gradient norm", "plain", True),
    ("tokens_per_s", "Throughput (tokens per second)", "count", True),
    ("memory_gib", "Peak memory of rank 0 (GiB)", "plain", False),
    ("mfu", "Model FLOPs utilisation", "percent", True),
    ("loss_scale", "Loss scale", "log", False),
)
# Key of an evaluation, title, how its axis reads.
EVAL_CHARTS: tuple[tuple[str, str, Axis], ...] = (
    ("bits_per_character", "Bits per character, held-out", "plain"),
    ("perplexity", "Perplexity per token, held-out", "log"),
)


@dataclass(frozen=True)
class Chart:
    """A chart and what is written under it."""

    title: str
    svg: Markup
    legend: list[tuple[str, int]]  # curve name, colour
    caption: str


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page of a run.

    Args:
        run_dir: the run's folder.
        out: HTML file; None = ``RUN/report.html``.

    Returns:
        The path of the page.

    Raises:
        ConfigError: when the folder is not a run's.
        StorageError: when the page cannot be written.
    """
    page = render_report(load_run(run_dir))
    out = run_dir / "report.html" if out is None else out
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(page, encoding="utf-8")
        aside.replace(out)
    except OSError as error:
        raise StorageError(
            f"cannot write {out}: {error.strerror}; give another file with --out"
        ) from error
    return out


def render_report(run: Run) -> str:
    """Return the page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(setting=show_setting, visible=show_text)
    environment.filters.update(number=show_number, when=show_time, fields=show_fields)
    return environment.get_template(TEMPLATE).render(
        run=run,
        name=run.config.get("name") or run.run_dir.name,
        now=time.time(),
        tiles=summarise(run),
        charts=draw_charts(run),
        comparison=compare(run),
        last_samples=[s for s in run.samples if s["step"] == run.samples[-1]["step"]],
        older_samples=[s for s in run.samples if s["step"] != run.samples[-1]["step"]],
        eval_rows=[
            (record["step"], name, figures)
            for record in run.evals
            for name, figures in record["sources"].items()
        ],
        mixture=tabulate(run.event("mixture")),
        lives=[dict(flatten(life)) for life in run.lives],
        environment=flatten(run.event("environment")),
        config=yaml.safe_dump(run.config, allow_unicode=True, sort_keys=False)
        if run.config
        else "",
    )


def summarise(run: Run) -> list[tuple[str, str]]:
    """Return the headline figures as label and value, those that are known."""
    last = run.train[-1] if run.train else {}
    of = f" / {run.max_steps}" if run.max_steps else ""
    shows = (
        ("Loss", "loss", show_number),
        ("Epochs", "epoch", lambda v: f"{v:.2f}"),
        ("Tokens", "tokens", show_count),
        ("of them trained", "trained_share", show_share),
        ("Padding", "padding_share", show_share),
        ("Tokens/s", "tokens_per_s", show_count),
        ("Peak memory", "memory_gib", lambda v: f"{v:.2f} GiB"),
        ("MFU", "mfu", show_share),
        ("Training time", "train_time_share", show_share),
    )
    tiles = [("Step", f"{run.last_step}{of}")]
    tiles += [(label, show(float(last[key]))) for label, key, show in shows if key in last]
    times = [record["time"] for record in (*run.train, *run.evals, *run.events) if "time" in record]
    if times:
        tiles.append(("Wall time", show_duration(max(times) - min(times))))
    if len(run.lives) > 1:
        tiles.append(("Lives", str(len(run.lives))))
    return tiles


def draw_charts(run: Run) -> list[Chart]:
    """Draw what is recorded: the loss, the held-out curves, then every other figure."""
    return [
        *_draw_train_chart(run, "loss", "Training loss", "plain", True),
        *(chart for row in EVAL_CHARTS for chart in _draw_eval_chart(run, *row)),
        *(chart for row in TRAIN_CHARTS for chart in _draw_train_chart(run, *row)),
    ]


def _draw_train_chart(run: Run, key: str, title: str, axis: Axis, noisy: bool) -> list[Chart]:
    """Draw one figure of the training records, or nothing where it is not recorded."""
    steps, values, num_lost = series(run.train, key)
    if not steps:
        return []
    curves = [Curve(steps, values, faint=noisy)]
    if noisy:
        curves.append(Curve(steps, smooth(values)))
    show = show_share if axis == "percent" else show_number
    low, high, last = map(show, (min(values), max(values), values[-1]))
    caption = f"last {last} · lowest {low} · highest {high}"
    if num_lost:
        caption += f" · {num_lost} not finite"
    # The SVG is our own and holds no text of the run's.
    return [Chart(title, Markup(draw_chart(key, curves, axis)), [], caption)]


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


def series(records: Sequence[Record], key: str) -> tuple[list[int], list[float], int]:
    """Return steps and finite values of ``key``, and how many values were not finite."""
    points = [(record["step"], float(record[key])) for record in records if key in record]
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite], len(points) - len(finite)


def source_names(run: Run) -> list[str]:
    """Return the evaluated sources in order of appearance."""
    return list(dict.fromkeys(name for record in run.evals for name in record["sources"]))


def compare(run: Run) -> list[dict[str, Any]]:
    """Return each source's first and last evaluation and the relative change in between."""
    rows = []
    for name in source_names(run):
        found = [record for record in run.evals if name in record["sources"]]
        first, last = found[0], found[-1]
        row: dict[str, Any] = {"source": name, "from": first["step"], "to": last["step"]}
        for key in ("bits_per_character", "bits_per_byte", "perplexity"):
            before, after = first["sources"][name].get(key), last["sources"][name].get(key)
            row[key] = None if before is None or after is None else (float(before), float(after))
        pair = row["bits_per_character"]
        row["change"] = None if pair is None or not pair[0] else pair[1] / pair[0] - 1
        rows.append(row)
    return rows


def tabulate(columns: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Return the names and the rows, one a source, of columns that map sources to figures."""
    columns = {name: cells for name, cells in columns.items() if isinstance(cells, Mapping)}
    sources = dict.fromkeys(source for cells in columns.values() for source in cells)
    rows = [[source, *(cells.get(source) for cells in columns.values())] for source in sources]
    return list(columns), rows


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return nested values as dotted keys."""
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows


def show_number(value: Any) -> str:
    """Return a figure with at least four significant digits, a whole number with separators."""
    if value is None:
        return "–"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.4g}"
    num_decimals = 4 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    return f"{value:,.{num_decimals}f}"


def show_share(value: float) -> str:
    """Return 0.034 as 3.4%."""
    return f"{value:.1%}"


def show_setting(value: Any) -> str:
    """Return a figure without trailing zeros, a path or word as it is."""
    if not isinstance(value, float):
        return show_number(value)
    return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"


# A young model writes control characters; Unicode has pictures of them, HTML forbids them.
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}


def show_text(text: str) -> str:
    """Return what a model wrote with its control characters made visible."""
    return text.translate({**CONTROL_PICTURES, 0x7F: 0x2421})


def show_time(seconds: float) -> str:
    """Return seconds since the epoch as local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def show_fields(event: Record) -> str:
    """Return what an event says beside its name, step and time."""
    rows = flatten({k: v for k, v in event.items() if k not in RECORD_KEYS})
    return ", ".join(f"{key} {show_setting(value)}" for key, value in rows)
