"""``kuroshio watch``: runs, their jobs, and what they cost, from files and a call of squeue."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live

from launch.monitor.page import render_page
from launch.monitor.queue import EVERY_S, Queue
from launch.monitor.row import Row
from launch.monitor.sources import Source, build_rows, find_sources, job_ids
from launch.monitor.table import build_table
from trainer.metrics.formats import show_time
from trainer.metrics.journal import plain
from trainer.metrics.page import write_page

RUNS = Path("runs")
MIN_EVERY_S = 1.0
FILE_WIDTH = 120  # of the table in a file or pipe


def main(argv: Sequence[str]) -> int:
    """Show the table once, or until Ctrl-C; return 0.

    Raises:
        ConfigError: when there is nothing to watch.
        StorageError: when the page cannot be written.
    """
    options = parse(argv)
    watch = Watch(options.path, Queue(is_on=not options.no_slurm), options.html)
    if options.json:
        watch.refresh()
        print(json.dumps(plain(watch.as_dict()), ensure_ascii=False, indent=2))
    elif options.once or not sys.stdout.isatty():
        watch.refresh()
        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else FILE_WIDTH
        console = Console(highlight=False, markup=False, width=width)
        console.print(watch.table(console.width))
    else:
        follow(watch, options.every)
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="kuroshio watch",
        allow_abbrev=False,
        description="Show what runs are doing: state of their jobs, steps, time left, loss, speed, "
        "GPU-hours and money spent, last checkpoint, lives and why they ended. Reads files only, "
        f"and asks squeue at most once in {EVERY_S:.0f} s.",
    )
    parser.add_argument(
        "path", type=Path, nargs="?", default=RUNS, metavar="FOLDER",
        help="a run, a pipeline, or a folder that holds some (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--once", action="store_true", help="print the table and leave")
    parser.add_argument("--json", action="store_true", help="print everything as JSON and leave")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page, too, and anew at every refresh"
    )
    parser.add_argument("--no-slurm", action="store_true", help="never call squeue")
    parser.add_argument(
        "--every",
        type=_seconds,
        default=5.0,
        metavar="S",
        help="seconds between refreshes (%(default)s)",
    )
    return parser.parse_args(argv)


def follow(watch: Watch, every_s: float, sleep: Callable[[float], None] = time.sleep) -> None:
    """Show the table anew every ``every_s`` seconds until Ctrl-C."""
    watch.refresh()
    console = Console(highlight=False)
    table = watch.table(console.width)
    with Live(table, console=console, auto_refresh=False, vertical_overflow="visible") as live:
        try:
            while True:
                sleep(every_s)
                watch.refresh(every_s)
                live.update(watch.table(console.width), refresh=True)
        except KeyboardInterrupt:
            return


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds >= MIN_EVERY_S:
        raise argparse.ArgumentTypeError(f"{text} is less than {MIN_EVERY_S:.0f} second")
    return seconds


class Watch:
    """The runs of a folder; what is shown of them is as old as the last refresh."""

    def __init__(self, path: Path, queue: Queue, page: Path | None = None) -> None:
        self._path, self._queue, self._page = path, queue, page
        self.time = 0.0
        self.rows: list[Row] = []

    def refresh(self, every_s: float | None = None) -> None:
        """Read all files again, and write the page that a browser then loads every ``every_s``."""
        sources = find_sources(self._path)
        self.time = time.time()
        self.rows = build_rows(sources, self._ask(sources))
        if self._page is not None:
            write_page(self._page, render_page(self.title(), self.rows, every_s), "--html")

    def title(self) -> str:
        """Return what the table is of, and of when."""
        title = f"{self._path}, {show_time(self.time)}"
        return title + (f" ({self._queue.problem})" if self._queue.problem else "")

    def table(self, width: int) -> RenderableType:
        """Return the table for a terminal of ``width`` columns."""
        return build_table(self.rows, self.title(), width)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        runs = [{**dataclasses.asdict(row), "folder": str(row.folder)} for row in self.rows]
        return {"time": self.time, "slurm": self._queue.problem or None, "runs": runs}

    def _ask(self, sources: list[Source]) -> Any:
        """Return Slurm's jobs, without asking where no run has one."""
        return self._queue.jobs() if job_ids(sources) else None
