"""Findings: levels, exit code, what is printed."""

from __future__ import annotations

import pytest
from rich.console import Console

from launch.checks.finding import Finding, as_data, error, exit_code, ok, warning
from launch.checks.table import count, render

GOOD = ok("files", "all well")
DOUBTFUL = warning("files", "slow", "because", "do this")
WRONG = Finding("ranks", "error", "n3 is silent", "it is down", "leave it out", ("n3",))
SLOW = Finding("links", "warning", "n1 is slow", "a cable", "leave it out", ("n1", "n3"))


def test_only_errors_fail() -> None:
    assert exit_code([GOOD, DOUBTFUL]) == 0
    assert exit_code([GOOD, WRONG]) == 78


@pytest.mark.parametrize(("why", "remedy"), [("", "do this"), ("because", "")])
def test_a_finding_without_reason_or_remedy_is_refused(why: str, remedy: str) -> None:
    with pytest.raises(ValueError, match="needs why and remedy"):
        error("files", "broken", why, remedy)


def test_table_ends_with_what_to_paste() -> None:
    console = Console(width=90, record=True)
    console.print(render([GOOD, DOUBTFUL, WRONG, SLOW]))
    text = console.export_text()
    assert "remedy: do this" in text and "1 ok, 2 warnings, 1 error" in text
    assert "do without: sbatch --exclude=n3, or cluster.exclude=n3" in text
    assert "slow, perhaps do without: sbatch --exclude=n1, " in text  # n3 is named already


def test_data_keeps_what_is_broken_from_what_is_slow() -> None:
    data = as_data([GOOD, WRONG, SLOW])
    assert (data["exit_code"], data["exclude"], data["slow"]) == (78, ["n3"], ["n1", "n3"])
    assert data["findings"][0] == {
        "topic": "files", "level": "ok", "what": "all well", "why": "", "remedy": "", "nodes": (),
    }  # fmt: skip


def test_count_says_one_error_and_two_errors() -> None:
    assert count([WRONG]) == "0 ok, 0 warnings, 1 error"
    assert count([WRONG, WRONG, DOUBTFUL]) == "0 ok, 1 warning, 2 errors"
