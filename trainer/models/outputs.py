"""Outputs of a vocabulary extension: complete with a manifest, or made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from trainer.disk import hash_file, write_synced
from trainer.errors import ConfigError

MANIFEST_NAME = "manifest.json"
FOLDERS = ("tokenizer", "model")
FILES = ("audit.json", "audit.html")


class Outputs:
    """The files of one run folder and the inputs they were made from.

    Args:
        run_dir: the run folder.
        inputs: plain data that decides the result.
    """

    def __init__(self, run_dir: Path, inputs: dict[str, Any]) -> None:
        self.run_dir = run_dir
        self.inputs = json.loads(json.dumps(inputs))

    @property
    def manifest(self) -> dict[str, Any]:
        """What the run folder says about itself; empty when it says nothing."""
        return read_json(self.run_dir / MANIFEST_NAME)

    def complete(self) -> bool:
        """Say whether the outputs are there, whole, and made from these inputs.

        Raises:
            ConfigError: the folder holds the result of other inputs.
        """
        manifest = self.manifest
        if not manifest:
            return False
        recorded = manifest.get("inputs", {})
        if recorded != self.inputs:
            changed = [key for key, value in self.inputs.items() if recorded.get(key) != value]
            raise ConfigError(
                f"run_dir={self.run_dir} was made from other inputs ({', '.join(changed)} differ); "
                "choose another run_dir, or remove this one"
            )
        return bool(manifest["complete"]) and all(
            (self.run_dir / name).is_file()
            and (self.run_dir / name).stat().st_size == entry["num_bytes"]
            for name, entry in manifest["files"].items()
        )

    def begin(self) -> None:
        """Remove what an interrupted run of the same inputs left, and record the inputs.

        Raises:
            ConfigError: the folder holds outputs that no manifest explains.
        """
        taken = [name for name in (*FOLDERS, *FILES) if (self.run_dir / name).exists()]
        if taken and not self.manifest:
            raise ConfigError(
                f"run_dir={self.run_dir} already holds {', '.join(taken)} of something else; "
                "choose another run_dir"
            )
        for name in FOLDERS:
            shutil.rmtree(self.run_dir / name, ignore_errors=True)
        self._write({"complete": False, "inputs": self.inputs, "files": {}})

    def commit(self) -> None:
        """Record size and SHA-256 of every output: from now on the run counts as done."""
        paths = [path for name in FOLDERS for path in sorted((self.run_dir / name).glob("*"))]
        paths += [self.run_dir / name for name in FILES]
        files = {
            path.relative_to(self.run_dir).as_posix(): {
                "num_bytes": path.stat().st_size,
                "sha256": hash_file(path),
            }
            for path in paths
        }
        self._write({"complete": True, "inputs": self.inputs, "files": files})

    def _write(self, manifest: dict[str, Any]) -> None:
        write_text(self.run_dir / MANIFEST_NAME, to_json(manifest))


def file_facts(path: Path) -> list[Any]:
    """Return what tells a file from a changed one without reading it."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def to_json(value: Any) -> str:
    """Return readable JSON with a final line end."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, or an empty one when there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    write_synced(aside, text.encode())
    aside.replace(path)
