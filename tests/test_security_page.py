"""docs/security.md: every rule has tests, and they are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/security.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| **")]
RULES = {re.findall(r"\*\*(.*?)\*\*", row)[0]: row for row in ROWS}


def test_the_table_has_all_its_rows() -> None:
    table = PAGE[PAGE.index("| rule | tests |") :].split("\n\n")[0].splitlines()
    assert table[2:] == ROWS and len(RULES) == len(ROWS) >= 19


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_its_tests(rule: str) -> None:
    named = re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", RULES[rule])
    assert named, "a rule without a test is a wish"
    for path, function in named:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        tests = {name for name in functions if name.startswith("test_")}
        assert (function in tests) if function else tests, f"{path} has no {function or 'test'}"
