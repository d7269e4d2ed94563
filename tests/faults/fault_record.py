"""Which tests prove which fault, and what became of them.

A test of row 8 of docs/reliability.md carries ``@pytest.mark.faults(row=8)``, one of two rows two
marks. ``pytest -m faults --fault-results=FILE`` writes what became of each; results of tests that
did not run now stay in FILE. ``tests/faults/table.py`` makes the page's table of it.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
PROPERTY = "fault row"
Results = dict[str, dict[str, Any]]


class FaultRecord:
    """Gathers the results of marked tests, from all workers."""

    def __init__(self, path: Path) -> None:
        self.path, self.results = path, Results()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        rows = sorted(value for name, value in report.user_properties if name == PROPERTY)
        if not rows:
            return
        empty = {"rows": rows, "outcome": "passed", "seconds": 0.0}
        result = self.results.setdefault(name_test(report.nodeid), empty)
        result["seconds"] = round(result["seconds"] + report.duration, 1)
        if report.outcome != "passed" and result["outcome"] != "failed":
            result["outcome"] = report.outcome
        if report.when == "teardown":
            self.write()

    def write(self) -> None:
        """Bring what is known into the file: the tests may be cut short."""
        known = read_results(self.path) if self.path.exists() else {}
        text = json.dumps(dict(sorted((known | self.results).items())), indent=1)
        self.path.write_text(text + "\n", encoding="utf-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that asks for a record."""
    parser.addoption("--fault-results", type=Path, help="write results of fault tests to this file")


def pytest_configure(config: pytest.Config) -> None:
    """Record in the process that hears of all tests."""
    path = config.getoption("--fault-results")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FaultRecord(path))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let reports carry the rows of their test."""
    for item in items:
        rows = {mark.kwargs["row"] for mark in item.iter_markers("faults") if "row" in mark.kwargs}
        item.user_properties += [(PROPERTY, row) for row in sorted(rows)]


def name_test(nodeid: str) -> str:
    """Return a test's name from tests/ on, one for all its parameters and workers."""
    return re.sub(r"\[.*\]$", "", re.sub(r"@[\w-]+$", "", nodeid)).removeprefix("tests/")


def read_results(path: Path) -> Results:
    """Return results by the name of the test."""
    results: Results = json.loads(path.read_text(encoding="utf-8"))
    return results


def find_tests(folder: Path = TESTS) -> dict[str, list[int]]:
    """Return the rows of each marked test by its name, read from the sources."""
    found = {}
    for path in sorted(folder.rglob("test_*.py")):
        if "faults" not in (text := path.read_text(encoding="utf-8")):
            continue
        tree = ast.parse(text)
        shared = [row for node in tree.body for row in _module_rows(node)]
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                rows = {*shared, *(row for d in node.decorator_list for row in _rows(d))}
                if rows:
                    found[f"{path.relative_to(folder)}::{node.name}"] = sorted(rows)
    return found


def _module_rows(node: ast.stmt) -> Iterator[int]:
    """Yield the rows in ``pytestmark = [...]``."""
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
        yield from _rows(node.value)


def _rows(node: ast.expr) -> Iterator[int]:
    """Yield the numbers in the marks ``faults(row=...)`` inside an expression."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.faults":
            yield from (ast.literal_eval(k.value) for k in call.keywords if k.arg == "row")
