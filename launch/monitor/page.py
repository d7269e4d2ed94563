"""The table of ``kuroshio watch`` as one self-contained HTML page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from launch.monitor import table
from launch.monitor.row import Row
from trainer.errors import StorageError

TEMPLATE = "watch.html.j2"
GOOD, BAD = ("finished", "running"), ("lost", "failed")


def write_page(path: Path, title: str, rows: Sequence[Row], every_s: float | None = None) -> None:
    """Write the page in one piece: a browser never sees half of it.

    Raises:
        StorageError: when it cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(render_page(title, rows, every_s), encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}; give another file with --html"
        ) from error


def render_page(title: str, rows: Sequence[Row], every_s: float | None = None) -> str:
    """Return the page; a browser loads it again every ``every_s`` seconds unless None."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        title=title, rows=rows, every_s=every_s, show=table, good=GOOD, bad=BAD,
        notes=table.below(rows),
    )  # fmt: skip
