"""What the audit of dependencies takes for a failure, and what it only tells."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import audit_dependencies
import pytest
from audit_dependencies import (
    ROOT,
    ask_database,
    direct_requirements,
    find_loose,
    judge,
    needed_packages,
)

FOUND = {"id": "PYSEC-1", "aliases": ["CVE-2026-24747"], "fix_versions": ["2.10.0"]}
REPORT: dict[str, Any] = {
    "dependencies": [
        {"name": "torch", "version": "2.9.0", "vulns": [FOUND]},
        {"name": "urllib3", "version": "2.0", "vulns": [{"id": "PYSEC-2", "fix_versions": []}]},
        {"name": "rich", "version": "15", "vulns": []},
        {"name": "peft", "skip_reason": "Dependency not found on PyPI"},
    ]
}


def test_our_own_requirements_fail_it_and_others_are_told() -> None:
    failures, remarks, num_audited = judge(REPORT, {"torch", "peft"})
    assert failures == ["torch 2.9.0: PYSEC-1, CVE-2026-24747; fixed in 2.10.0"]
    assert any(line.startswith("urllib3 2.0: PYSEC-2; fixed in none yet") for line in remarks)
    assert any(line.startswith("not audited: peft") for line in remarks) and num_audited == 3


def test_what_is_accepted_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(audit_dependencies.ACCEPTED, "CVE-2026-24747", "no such files are read")
    failures, remarks, _ = judge(REPORT, {"torch"})
    assert failures == [] and "(no such files are read)" in remarks[0]


def test_the_lock_is_whole() -> None:
    """Every version is exact, and all that setup.cfg's packages need in turn is in it."""
    lock = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    direct = direct_requirements((ROOT / "setup.cfg").read_text(encoding="utf-8"))
    assert {"torch", "transformers", "hydra-core", "fastapi", "ruff"} <= direct
    needed = needed_packages(direct)
    assert {"huggingface-hub", "jinja2", "markupsafe"} <= needed
    assert find_loose(lock, direct | needed) == []


def test_a_loose_lock_is_named() -> None:
    lock = "# a\nrich>=13\nnumpy==2.*\ntorch==2.13.0 ; python_version > '3'\n"
    found = find_loose(lock, ["Py_X"])
    assert len(found) == 3 and "rich>=13" in found[0] and "py-x is needed" in found[2]


def test_a_database_that_cannot_be_reached_is_no_clean_bill(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_dependencies, "distributions", list)
    program = tmp_path / "pip-audit"
    program.write_text("#!/bin/sh\necho 'ConnectionError: no route' >&2\nexit 1\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    assert ask_database(str(program), tmp_path) == (None, "ConnectionError: no route")
    for name in (program, tmp_path / "none"):
        assert audit_dependencies.main(str(name)) == 0
        assert "NOT AUDITED" in capsys.readouterr().out
