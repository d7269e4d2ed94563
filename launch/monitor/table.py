"""The table of ``kuroshio watch`` on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from launch.monitor.row import Row
from trainer.metrics.console import show_count, show_duration

STYLES = {
    "finished": "green", "running": "bold cyan", "stopping": "yellow", "pending": "blue",
    "requeued": "yellow", "submitted": "blue", "new": "dim", "waiting": "dim",
    "stopped": "yellow", "held": "magenta", "lost": "bold red", "failed": "bold red",
}  # fmt: skip
BAR_WIDTH = 12
WIDTHS = {"run": 12, "state": 16, "lives": 12}  # columns that fold, but not to ribbons
SHOWS = {
    "loss": lambda value: f"loss {value:.4f}",
    "accuracy": lambda value: f"accuracy {value:.1%}",
    "reward": lambda value: f"reward {value:.3f}",
    "kl": lambda value: f"kl {value:.2f}",
}
MAX_ENDS = 3  # causes of earlier ends shown of each run


def build_table(rows: Sequence[Row], title: str) -> RenderableType:
    """Return the table with what has to be said below it."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("run", "state", "progress", "figures", "spent", "saved", "lives"):
        is_short = header in ("progress", "figures", "saved")
        table.add_column(header, overflow="fold", no_wrap=is_short, min_width=WIDTHS.get(header))
    for row in rows:
        table.add_row(
            _name_cell(row),
            _state_cell(row),
            _progress_cell(row),
            _lines(figure_lines(row)),
            _lines(spent_lines(row)),
            _lines(saved_lines(row)),
            _lines(life_lines(row)),
        )
    notes = [Text(line, overflow="fold") for line in below(rows)]
    return Group(table, *notes) if notes else table


def below(rows: Iterable[Row]) -> list[str]:
    """Return what belongs to no cell: why a run failed or waits, odd files, what to type."""
    lines = []
    for row in rows:
        lines += [f"{row.name}: {problem}" for problem in row.problems]
        if row.needs_another_job:
            lines.append(
                f"{row.name}: its job's time ends before the run does; it will save, stop and be "
                "requeued"
            )
    unsent = [line for row in rows for line in row.wandb]
    if unsent:
        lines += ["recorded offline by wandb; to send it, where there is a network:", *unsent]
    return lines


def figure_lines(row: Row) -> list[str]:
    """Return the stage's figures and the speed."""
    lines = [SHOWS[key](value) for key, value in row.figures.items()]
    return lines + ([f"{show_count(row.tokens_per_s)} tok/s"] if row.tokens_per_s else [])


def spent_lines(row: Row) -> list[str]:
    """Return GPU-hours and money; an unknown price is left out."""
    if row.gpu_hours is None:
        return []
    more = "≥ " if row.is_lower_bound else ""
    plan = f" of {row.planned_gpu_hours:,.2f}" if row.planned_gpu_hours else ""
    unit = "CPU rank-h" if row.is_cpu else "GPU-h"
    lines = [f"{more}{row.gpu_hours:,.2f}{plan} {unit}"]
    return lines + [f"{more}{c.currency} {c.amount:,.2f} {c.who}" for c in row.costs]


def saved_lines(row: Row) -> list[str]:
    """Return step and age of the newest checkpoint."""
    if row.saved_step is None or row.saved_age_s is None:
        return []
    return [f"step {row.saved_step}", f"{show_duration(row.saved_age_s)} ago"]


def life_lines(row: Row) -> list[str]:
    """Return how many lives and why the last ones ended."""
    lines = [str(row.num_lives)] if row.num_lives else []
    first = max(0, len(row.ends) - MAX_ENDS)
    return lines + [f"{n}: {end}" for n, end in enumerate(row.ends[first:], start=first + 1)]


def time_lines(row: Row) -> list[str]:
    """Return the time to the end of the run, of the job, or to its start."""
    lines = []
    if row.eta_s is not None and row.state not in ("finished", "failed"):
        lines.append(f"{show_duration(row.eta_s)} to go")
    if row.limit_s is not None:
        lines.append(f"{show_duration(row.limit_s)} to the time limit")
    if row.starts_s is not None:
        lines.append(f"starts in {show_duration(row.starts_s)}")
    return lines


def step_line(row: Row) -> str:
    """Return the steps done of those to do."""
    if row.step is None and row.max_steps is None:
        return ""
    return f"{row.step or 0:,}" + (f" / {row.max_steps:,}" if row.max_steps else "")


def _name_cell(row: Row) -> Text:
    cell = Text(row.name, style="bold")
    if row.stage and row.stage not in row.name:
        cell.append(f"\n{row.stage}", style="dim")
    if row.parents:
        cell.append(f"\nafter {', '.join(row.parents)}", style="dim")
    return cell


def _state_cell(row: Row) -> Text:
    cell = Text(row.state, style=STYLES[row.state])
    places = " on ".join(p for p in (f"job {row.job}" if row.job else "", row.nodes) if p)
    for line in (places, row.note):
        if line:
            cell.append(f"\n{line}", style="dim")
    return cell


def _progress_cell(row: Row) -> Text:
    lines = [line for line in (step_line(row), *time_lines(row)) if line]
    if row.share is None:
        return _lines(lines)
    done = round(row.share * BAR_WIDTH)
    cell = Text("━" * done, style=STYLES[row.state])
    cell.append("━" * (BAR_WIDTH - done), style="bright_black")
    # Without colours the two parts of the bar look alike, hence the share in figures.
    cell.append(f" {row.share:.0%}")
    late = "yellow" if row.needs_another_job else ""
    return cell.append("\n" + "\n".join(lines), style=late)


def _lines(lines: Sequence[str]) -> Text:
    return Text("\n".join(lines))
