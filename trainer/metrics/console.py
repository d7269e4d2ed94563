"""What a run shows while it goes: a progress bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table


def show_count(value: float) -> str:
    """Return ``value`` with a k, M or G: 12345 → 12.3k."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def show_duration(seconds: float) -> str:
    """Return seconds as ``h:mm:ss`` (days counted in hours)."""
    if not math.isfinite(seconds):
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def show_field(value: Any) -> str:
    """Return a field of an event: figures short, nested ones in braces."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} {show_field(item)}" for key, item in value.items()) + "}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def describe_step(metrics: Mapping[str, float]) -> str:
    """Return the figures of a step as one line, those that are present."""
    shows = {
        "epoch": lambda v: f"epoch {v:.2f}",
        "loss": lambda v: f"loss {v:.4f}",
        "accuracy": lambda v: f"accuracy {v:.1%}",
        "reward": lambda v: f"reward {v:.3f}",
        "kl": lambda v: f"kl {v:.2f}",
        "lr": lambda v: f"lr {v:.2e}",
        "grad_norm": lambda v: f"grad {v:.2f}",
        "tokens_per_s": lambda v: f"{show_count(v)} tok/s",
        "memory_gib": lambda v: f"{v:.2f} GiB",
        "mfu": lambda v: f"mfu {v:.1%}",
        "eta_s": lambda v: f"eta {show_duration(v)}",
    }
    return "  ".join(show(metrics[key]) for key, show in shows.items() if key in metrics)


class RunConsole:
    """Rank 0's view of a run."""

    def __init__(
        self, name: str, max_steps: int, first_step: int = 0, file: TextIO | None = None
    ) -> None:
        """Prepare the view; the bar appears with the first step.

        Args:
            name: of the run.
            max_steps: step at which the run ends.
            first_step: step it resumes at.
            file: None = standard error, where progress belongs.
        """
        self.max_steps = max_steps
        self._console = Console(file=file, stderr=file is None, highlight=False)
        self._progress: Progress | None = None
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
                expand=True,
            )
            self._task = self._progress.add_task(
                escape(name), total=max_steps, completed=first_step, figures=""
            )

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a step's figures."""
        line = describe_step(metrics)
        if self._progress is None:
            self.note(f"step {step}/{self.max_steps}  {line}")
            return
        self._progress.start()  # does nothing when it has started
        self._progress.update(self._task, completed=step, figures=line)

    def evaluate(self, step: int, sources: Mapping[str, Mapping[str, float]]) -> None:
        """Show the held-out figures of every source."""
        if self._progress is None:
            for name, figures in sources.items():
                parts = "  ".join(f"{key} {value:.4f}" for key, value in _held_out(figures))
                self.note(f"step {step}/{self.max_steps}  eval {name}  {parts}")
            return
        table = Table("source", title=f"held-out, step {step}", title_justify="left")
        keys = dict.fromkeys(key for figures in sources.values() for key, _ in _held_out(figures))
        for key in keys:
            table.add_column(key.replace("_", " "), justify="right")
        for name, figures in sources.items():
            shown = dict(_held_out(figures))
            cells = (f"{shown[key]:.4f}" if key in shown else "" for key in keys)
            table.add_row(escape(name), *cells)
        self._console.print(table)

    def note(self, text: str) -> None:
        """Show one line as it is."""
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._progress is not None:
            self._progress.stop()


def _held_out(figures: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return the figures that are measures, without the counts behind them."""
    return [(key, value) for key, value in figures.items() if not key.startswith("num_")]
