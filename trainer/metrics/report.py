"""A run as one self-contained HTML page, made from its folder alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trainer.metrics.account import LIFE_COLUMNS, summarise_jobs, tabulate_lives, wandb_lines
from trainer.metrics.console import show_count, show_duration
from trainer.metrics.formats import show_number, show_setting, show_share, show_text, show_time
from trainer.metrics.history import RECORD_KEYS, Record, Run, load_run
from trainer.metrics.life import build_life, read_time
from trainer.metrics.page import read_template, write_page
from trainer.metrics.planned import compare_plan
from trainer.metrics.rank_report import COLUMNS as RANK_COLUMNS
from trainer.metrics.rank_report import tabulate_ranks
from trainer.metrics.run_charts import draw_charts, source_names
from trainer.metrics.run_facts import read_run

TEMPLATE = Path(__file__).with_name("report.html.j2")

# Held-out figures whose first and last values are compared, where they are recorded.
COMPARED = {
    "bits_per_character": "Bits per character",
    "bits_per_byte": "Bits per byte",
    "perplexity": "Perplexity per token",
    "accuracy": "Accuracy",
    "margin": "Margin",
    "calibration_error": "Calibration error",
}


def write_report(
    run_dir: Path, out: Path | None = None, plan: Mapping[str, Any] | None = None
) -> Path:
    """Write the page of a run.

    Args:
        run_dir: the run's folder.
        out: HTML file; None = ``RUN/report.html``.
        plan: of the run, as plain data; None takes the one made at submission.

    Returns:
        The path of the page.

    Raises:
        ConfigError: when the folder is not a run's.
        StorageError: when the page cannot be written.
    """
    page = render_report(load_run(run_dir), plan)
    out = run_dir / "report.html" if out is None else out
    write_page(out, page, "--out")
    return out


def render_report(run: Run, plan: Mapping[str, Any] | None = None) -> str:
    """Return the page as HTML; ``plan`` as for ``write_report``."""
    template = read_template(
        TEMPLATE, setting=show_setting, visible=show_text, number=show_number, when=show_time,
        fields=show_fields, share=show_share,
    )  # fmt: skip
    recorded = held_out_figures(run)
    facts = read_run(run.run_dir)
    return template.render(
        run=run,
        name=run.config.get("name") or run.run_dir.name,
        now=time.time(),
        tiles=summarise(run),
        charts=draw_charts(run),
        comparison=compare(run),
        compared=[(key, title) for key, title in COMPARED.items() if key in recorded],
        last_samples=[s for s in run.samples if s["step"] == run.samples[-1]["step"]],
        older_samples=[s for s in run.samples if s["step"] != run.samples[-1]["step"]],
        eval_rows=[
            (record["step"], name, figures)
            for record in run.evals
            for name, figures in record["sources"].items()
        ],
        eval_columns=recorded,
        rank_columns=RANK_COLUMNS,
        ranks=tabulate_ranks(run.ranks),
        mixture=tabulate(run.event("mixture")),
        jobs=summarise_jobs(facts, read_time(run.event("time_limit").get("at"))),
        planned=compare_plan(run, facts, plan),
        life_columns=LIFE_COLUMNS,
        lives=tabulate_lives(run.lives, [build_life(life) for life in run.lives], run.events),
        problems=facts.problems,
        wandb=wandb_lines(run.run_dir),
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
        ("Skipped steps", "num_skips", show_count),
    )
    tiles = [("Step", f"{run.last_step}{of}")]
    tiles += [(label, show(float(last[key]))) for label, key, show in shows if key in last]
    num_roll_backs = sum(event.get("event") == "roll_back" for event in run.events)
    if num_roll_backs:
        tiles.append(("Roll-backs", str(num_roll_backs)))
    times = [record["time"] for record in (*run.train, *run.evals, *run.events) if "time" in record]
    if times:
        tiles.append(("Wall time", show_duration(max(times) - min(times))))
    if len(run.lives) > 1:
        tiles.append(("Lives", str(len(run.lives))))
    return tiles


def compare(run: Run) -> list[dict[str, Any]]:
    """Return each source's first and last evaluation and the relative change in between."""
    rows = []
    for name in source_names(run):
        found = [record for record in run.evals if name in record["sources"]]
        first, last = found[0], found[-1]
        row: dict[str, Any] = {"source": name, "from": first["step"], "to": last["step"]}
        for key in COMPARED:
            before, after = first["sources"][name].get(key), last["sources"][name].get(key)
            row[key] = None if before is None or after is None else (float(before), float(after))
        pair = row["bits_per_character"]
        row["change"] = None if pair is None or not pair[0] else pair[1] / pair[0] - 1
        figures = last["sources"][name]
        if "accuracy_low" in figures:
            row["interval"] = figures["accuracy_low"], figures["accuracy_high"]
        rows.append(row)
    return rows


def held_out_figures(run: Run) -> list[str]:
    """Return the names of all figures that an evaluation recorded, in order of appearance."""
    figures = (figures for record in run.evals for figures in record["sources"].values())
    return list(dict.fromkeys(key for own in figures for key in own))


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


def show_fields(event: Record) -> str:
    """Return what an event says beside its name, step and time."""
    rows = flatten({k: v for k, v in event.items() if k not in RECORD_KEYS})
    return ", ".join(f"{key} {show_setting(value)}" for key, value in rows)
