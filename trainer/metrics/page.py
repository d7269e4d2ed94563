"""Pages of HTML: their templates, and files that a browser never sees half of."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from trainer.errors import StorageError


def read_template(path: Path, **filters: Callable[..., Any]) -> Template:
    """Return a page's template; what it shows is escaped, what it lacks is an error."""
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(path.name)


def write_page(path: Path, text: str, flag: str) -> None:
    """Write a page in one piece.

    Args:
        path: the file.
        text: of the page.
        flag: which names another file.

    Raises:
        StorageError: when it cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}; give another file with {flag}"
        ) from error
