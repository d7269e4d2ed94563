"""A copy of the code in the run's folder, which all lives of its jobs run."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from launch import ROOT
from trainer.errors import StorageError

PARTS = ("launch", "trainer", "tokenizer", "conf", "slurm")
HASHED = ("launch", "trainer", "tokenizer")
# `python RUN/code WORDS` is `kuroshio WORDS` of this copy: Python looks for modules in the folder
# that it runs first, while `python -m` would prefer those of the working directory, which is often
# a checkout.
ENTRY = '''"""`kuroshio` of this copy; `-m MODULE` runs one of its modules."""

import runpy
import sys

if __name__ == "__main__":
    if sys.argv[1:2] == ["-m"]:
        name = sys.argv[2]
        del sys.argv[1:3]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        from launch.__main__ import main

        main()
'''


def copy_code(target: Path, root: Path = ROOT) -> None:
    """Copy the packages, their configuration and the environments of clusters to ``target``.

    A copy that is there already is replaced in one step.

    Raises:
        StorageError: the folder cannot be written.
    """
    fresh, old = (target.with_name(f".{target.name}.{os.getpid()}.{n}") for n in ("new", "old"))
    try:
        for part in PARTS:
            shutil.copytree(
                root / part, fresh / part, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
            )
        (fresh / "__main__.py").write_text(ENTRY, encoding="utf-8")
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    except (OSError, shutil.Error) as error:
        raise StorageError(f"{target} cannot be written: {error}; free space there") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def hash_code(root: Path = ROOT) -> str:
    """Return the SHA-256 over names and contents of the project's Python files."""
    digest = hashlib.sha256()
    for package in HASHED:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
