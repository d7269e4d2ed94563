"""Names of models on a hub, where folders are meant: nothing here fetches anything."""

from __future__ import annotations

import re
from pathlib import Path

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # OWNER/NAME


def how_to_fetch(path: str | Path, kind: str = "") -> str:
    """Return what to do about a path that looks like a name on huggingface.co, else nothing.

    Nodes of a cluster seldom reach the internet, and a download in every rank helps nobody: so
    what a run reads is fetched before, where there is internet.

    Args:
        path: what was given in the place of a folder.
        kind: ``dataset``, or nothing for a model.
    """
    name = str(path)
    if Path(name).exists() or not HUB_NAME.fullmatch(name):
        return ""
    flag = f" --repo-type {kind}" if kind else ""
    return (
        f"; runs fetch nothing: where there is internet, `hf download {name}{flag} --local-dir "
        "FOLDER`, then give FOLDER"
    )
