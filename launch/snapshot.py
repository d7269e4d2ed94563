"""A copy of the code in the run's folder, which all lives of its jobs run."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from launch import ROOT
from launch.secrets import looks_secret
from trainer.errors import ConfigError, StorageError
from trainer.metrics.redaction import PRIVATE_KEY, SECRET_VALUE

PARTS = ("launch", "trainer", "tokenizer", "conf", "slurm")
# Never copied: caches, and where people and programs keep keys.
LEFT_OUT = (
    "__pycache__", "*.pyc", ".*", "_netrc", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.kdbx",
    "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "credentials*", "*.secret", "secrets.y*ml",
)  # fmt: skip
# NAME=VALUE of a shell, `NAME: VALUE` of YAML, with or without quotes.
ASSIGNMENT = re.compile(r"^\s*(?:export\s+)?([\w.-]+)\s*(?:=|:\s)\s*([^\s#]+)")
SECRET = re.compile(f"{SECRET_VALUE.pattern}|{PRIVATE_KEY.pattern}")
REFERENCE = re.compile(r"$|\$|null$|~$|/")
ASSIGNING = (".sh", ".yaml", ".yml")
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
        ConfigError: a file holds a secret, or leads out of the checkout.
        StorageError: the folder cannot be written.
    """
    refuse_secret_files(root)
    fresh, old = (target.with_name(f".{target.name}.{os.getpid()}.{n}") for n in ("new", "old"))
    try:
        for part in PARTS:
            shutil.copytree(root / part, fresh / part, ignore=shutil.ignore_patterns(*LEFT_OUT))
        (fresh / "__main__.py").write_text(ENTRY, encoding="utf-8")
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    except (OSError, shutil.Error) as error:
        raise StorageError(f"{target} cannot be written: {error}; free space there") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def refuse_secret_files(root: Path = ROOT) -> None:
    """Raise ConfigError naming each line of what would be copied that looks like a secret.

    Links that lead out of the checkout would bring what nobody meant to copy.
    """
    problems = []
    for path in _copied_files(root):
        if not path.resolve().is_relative_to(root.resolve()):
            problems.append(f"{path} is a link to {path.resolve()}: put the file itself there")
        elif lines := _secret_lines(path):
            where = ", ".join(map(str, lines))
            problems.append(
                f"{path}, line {where}: looks like a secret (not shown), which every run's copy of "
                "the code would hold; put it into your shell's environment instead"
            )
    if problems:
        raise ConfigError("\n".join(problems))


def _copied_files(root: Path) -> Iterator[Path]:
    ignore = shutil.ignore_patterns(*LEFT_OUT)
    for part in PARTS:
        for folder, folders, files in os.walk(root / part, followlinks=True):
            left_out = ignore(folder, [*folders, *files])
            folders[:] = [name for name in folders if name not in left_out]
            yield from (Path(folder) / name for name in files if name not in left_out)


def _secret_lines(path: Path) -> list[int]:
    """Return the numbers of the lines that look like a secret."""
    text = path.read_text(encoding="utf-8", errors="replace")
    found = {text.count("\n", 0, match.start()) + 1 for match in SECRET.finditer(text)}
    if path.suffix in ASSIGNING:
        found |= {n for n, line in enumerate(text.splitlines(), 1) if _sets_secret(line)}
    return sorted(found)


def _sets_secret(line: str) -> bool:
    """Return whether a line sets a secret; what refers to another value, or to none, tells none."""
    found = ASSIGNMENT.match(line)
    value = found[2].strip("'\"") if found else ""
    return found is not None and not REFERENCE.match(value) and looks_secret(found[1], value)


def hash_code(root: Path = ROOT) -> str:
    """Return the SHA-256 over names and contents of the project's Python files."""
    digest = hashlib.sha256()
    for package in HASHED:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
