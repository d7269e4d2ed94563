"""The table of ``kuroshio watch`` as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launch.monitor import table
from launch.monitor.row import Row
from trainer.metrics.page import read_template

TEMPLATE = Path(__file__).with_name("watch.html.j2")
GOOD, BAD = ("finished", "running"), ("lost", "failed")


def render_page(title: str, rows: Sequence[Row], every_s: float | None = None) -> str:
    """Return the page; a browser loads it again every ``every_s`` seconds unless None."""
    return read_template(TEMPLATE).render(
        title=title, rows=rows, every_s=every_s, show=table, good=GOOD, bad=BAD,
        notes=table.below(rows),
    )  # fmt: skip
