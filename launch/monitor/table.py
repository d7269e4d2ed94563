"""The table of ``kuroshio watch`` on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

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
WIDE = 104  # columns of a terminal that hold the whole table
WHOLE = ("progress", "figures", "saved")  # columns that are not folded
WIDTHS = {
    "run": 10,
    "state": 14,
    "progress": 17,
    "figures": 11,
    "spent": 10,
    "saved": 8,
    "lives": 5,
}
SHOWS = {
    "loss": lambda value: f"loss {value:.4f}",
    "accuracy": lambda value: f"accuracy {value:.1%}",
    "reward": lambda value: f"reward {value:.3f}",
    "kl": lambda value: f"kl {value:.2f}",
    "num_skips": lambda value: f"{value:.0f} skipped",
}
MAX_ENDS = 3  # causes of earlier ends shown of each run
NOTE_WIDTH = 40  # longer ones stand below the table


def build_table(rows: Sequence[Row], title: str, width: int = WIDE) -> RenderableType:
    """Return the table for ``width`` columns of a terminal, with what has to be said below it."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    cells = _cells(is_narrow=width < WIDE)
    whole = WHOLE if width >= WIDE else WHOLE[:1]
    for header in cells:
        table.add_column(header, overflow="fold", no_wrap=header in whole, min_width=WIDTHS[header])
    for row in rows:
        table.add_row(*(show(row) for show in cells.values()))
    notes = [Text(line, overflow="fold") for line in below(rows)]
    return Group(table, *notes) if notes else table


def _cells(is_narrow: bool) -> dict[str, Callable[[Row], Text]]:
    """Return the columns and what stands in each; a narrow terminal has no room for all apart."""
    first = {"run": _name_cell, "state": _state_cell, "progress": _progress_cell}
    if is_narrow:
        more = {"figures": lambda row: _lines([*figure_lines(row), *spent_lines(row)])}
        last = {"saved": lambda row: _lines([*saved_lines(row), *_count_lives(row)])}
        return first | more | last
    return first | {
        "figures": lambda row: _lines(figure_lines(row)),
        "spent": lambda row: _lines(spent_lines(row)),
        "saved": lambda row: _lines(saved_lines(row)),
        "lives": lambda row: Text(str(row.num_lives or "")),
    }


def _count_lives(row: Row) -> list[str]:
    return [f"life {row.num_lives}"] if row.num_lives else []


def below(rows: Iterable[Row]) -> list[str]:
    """Return what fits into no cell: why lives ended, odd files, what to type."""
    lines = []
    for row in rows:
        lines += [f"{row.name}: {text}" for text in (*end_lines(row), *row.ranks, *row.problems)]
        if not is_short(row.note):
            lines.append(f"{row.name} {row.state}: {row.note}")
        if row.needs_another_job:
            lines.append(
                f"{row.name}: its job's time ends before the run does; it will save, stop and be "
                "requeued"
            )
    unsent = [line for row in rows for line in row.wandb]
    if unsent:
        lines += ["recorded offline by wandb; to send it, where there is a network:", *unsent]
    return lines


def end_lines(row: Row) -> list[str]:
    """Return why the last lives before this one ended."""
    first = max(0, len(row.ends) - MAX_ENDS)
    ends = enumerate(row.ends[first:], start=first + 1)
    return [f"life {number} ended: {why}" for number, why in ends]


def is_short(note: str) -> bool:
    """Return whether a note has room in its cell."""
    return len(note) <= NOTE_WIDTH


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
    lines = [f"{more}{row.gpu_hours:,.2f}{plan} {row.hours_unit}"]
    return lines + [f"{more}{c.currency} {c.amount:,.2f} {c.who}" for c in row.costs]


def saved_lines(row: Row) -> list[str]:
    """Return step and age of the newest checkpoint."""
    if row.saved_step is None or row.saved_age_s is None:
        return []
    return [f"step {row.saved_step}", f"{show_duration(row.saved_age_s)} ago"]


def time_lines(row: Row) -> list[str]:
    """Return the time to the end of the run, of the job, or to its start."""
    lines = []
    if row.eta_s is not None and row.state not in ("finished", "failed"):
        time = show_duration(row.eta_s)
        lines.append(f"done in {time}" if row.state == "running" else f"{time} to go")
    if row.limit_s is not None:
        lines.append(f"limit in {show_duration(row.limit_s)}")
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
    for line in (places, row.note if is_short(row.note) else ""):
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
