"""A package of many modules says in its docstring what each is for."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "launch/checks",
    "launch/graph",
    "launch/monitor",
    "launch/verification",
    "trainer/plan",
)
ENTRY = re.compile(r"^(?:    )?(\w+(?:, \w+)*)  +\S", re.MULTILINE)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_map_names_every_module(package: str) -> None:
    folder = ROOT / package
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    named = [name for entry in ENTRY.findall(text or "") for name in entry.split(", ")]
    assert sorted(named) == sorted(path.stem for path in folder.glob("[!_]*.py"))
