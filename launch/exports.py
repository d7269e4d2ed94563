"""``RUN/exports.jsonl``: what was exported from a run, and where to."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.disk import hash_file
from trainer.engine.manifest import MANIFEST_NAME
from trainer.lives import utc_now
from trainer.metrics.journal import read_lines

LOG = logging.getLogger(__name__)
EXPORTS_NAME = "exports.jsonl"


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of every file of an export."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hash_file(path),
        }
        for path in files
    }


def note_export(run_dir: Path, out: Path, checkpoint: Path, options: Mapping[str, Any]) -> None:
    """Add a line about an export; a run that cannot be written to is exported all the same.

    Args:
        run_dir: the run's folder.
        out: the finished export.
        checkpoint: its folder.
        options: ``dtype``, ``adapter`` and ``base`` of the export.
    """
    record = {
        "time": utc_now(),
        "folder": str(out.absolute()),
        "checkpoint": checkpoint.name,
        "manifest_sha256": hash_file(checkpoint / MANIFEST_NAME),
        **options,
        "files": describe_files(out),
    }
    try:
        with (run_dir / EXPORTS_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        LOG.warning("%s: `kuroshio verify` will not know of this export: %s", run_dir, error)


def read_exports(run_dir: Path) -> list[dict[str, Any]]:
    """Return what was exported, the last of each folder."""
    records = [r for r in read_lines(run_dir / EXPORTS_NAME) if isinstance(r.get("files"), dict)]
    return list({str(record.get("folder")): record for record in records}.values())
