"""Versions against setup.cfg and constraints.txt."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import ROOT
from launch.checks.packages import PackageFacts, gather, judge, read_pins, read_ranges


def facts(**changes: object) -> PackageFacts:
    values: dict[str, object] = {
        "python": "3.11.7",
        "python_range": ">=3.10",
        "installed": {"torch": "2.13.0+cpu", "peft": "0.21.2"},
        "ranges": {"torch": ">=2.10,<3", "peft": ">=0.21,<1"},
        "tested": {"torch": "2.13.0", "peft": "0.21.2"},
    }
    return PackageFacts(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({}, "ok", "2 packages are in the ranges"),
        ({"python": "3.9.2"}, "error", "Python 3.9.2"),
        ({"installed": {"torch": None, "peft": "0.21.2"}}, "error", "not installed: torch"),
        (
            {"installed": {"torch": "2.9.1", "peft": "0.21.2"}},
            "error",
            "outside setup.cfg: torch 2.9.1 (needs <3,>=2.10)",
        ),
        (
            {"installed": {"torch": "2.12.0", "peft": "0.21.2"}},
            "warning",
            "not the tested versions: torch 2.12.0 (tested 2.13.0)",
        ),
        ({"ranges": {}, "installed": {}}, "ok", "no setup.cfg beside the code"),
    ],
)
def test_judge(changes: dict[str, object], level: str, words: str) -> None:
    if "ranges" not in changes:
        changes = {"ranges": {"torch": "<3,>=2.10", "peft": ">=0.21,<1"}, **changes}
    found = judge(facts(**changes))
    assert any(f.level == level and words in f.what for f in found), found
    assert all(f.level in ("ok", level) or f.level == "warning" for f in found)


def test_a_cpu_build_of_the_tested_version_is_the_tested_version() -> None:
    assert all(f.level == "ok" for f in judge(facts()))


def test_this_checkout_is_read() -> None:
    python, ranges = read_ranges(ROOT / "setup.cfg")
    assert python == ">=3.10" and "torch" in ranges and "rich" in ranges
    assert set(gather().installed) == set(ranges)


def test_pins_are_those_of_this_python(tmp_path: Path) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text(
        '# head\nnumpy==2.4.6 ; python_version >= "3.0"\nnumpy==1.0 ; python_version < "3.0"\n'
        "torch==2.13.0\n"
    )
    assert read_pins(path) == {"numpy": "2.4.6", "torch": "2.13.0"}
    assert read_pins(tmp_path / "absent.txt") == {}
