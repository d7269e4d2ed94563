"""``make audit``: is the lock whole, and what is known of its versions?

pip-audit asks a database of vulnerabilities for every version of constraints.txt. Where no such
database can be reached it still ends well, so what it did not look at is counted here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
OWN = {"kuroshio", "pip"}  # ourselves, and what comes with every environment
BUILDS = re.compile(r"(nvidia|cuda|triton)\b")  # torch's own, by the build in use
TIMEOUT_S = 300
ACCEPTED: dict[str, str] = {}  # vulnerability -> why it does not concern us


def needed_packages(direct: Iterable[str]) -> set[str]:
    """Return the canonical names of ``direct`` and of all that they need, as installed here."""
    requires = {canonicalize_name(d.metadata["Name"]): d.requires or [] for d in distributions()}
    found, waiting = set[str](), [*direct]
    while waiting:
        name = waiting.pop()
        if name in found or name not in requires:
            continue
        found.add(name)
        for text in requires[name]:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(canonicalize_name(requirement.name))
    return found


def find_loose(lock: str, needed: Iterable[str]) -> list[str]:
    """Return what keeps a lock from being whole: ranges in it, and packages that it lacks."""
    lines = [line.partition("#")[0].strip() for line in lock.splitlines()]
    pins = [Requirement(line) for line in lines if line]
    exact = re.compile(r"==[^*,]+")
    loose = [f"{pin}: no exact version" for pin in pins if not exact.fullmatch(str(pin.specifier))]
    known = {canonicalize_name(pin.name) for pin in pins} | OWN
    names = {canonicalize_name(name) for name in needed}
    return loose + [
        f"{name} is needed, but not in the lock"
        for name in sorted(names - known)
        if not BUILDS.match(name)
    ]


def judge(report: Mapping[str, Any], direct: set[str]) -> tuple[list[str], list[str], int]:
    """Return what fails the audit, what it remarks, and how many packages it looked at.

    A vulnerability of a package that we ask for ourselves fails it: another version is ours to
    choose. One of a package that others bring is theirs to mend, and is told.

    Args:
        report: pip-audit's JSON.
        direct: canonical names of setup.cfg's own requirements.
    """
    failures, remarks, num_audited = [], [], 0
    for package in report["dependencies"]:
        if "vulns" not in package:
            remarks.append(f"not audited: {package['name']}: {package['skip_reason']}")
            continue
        num_audited += 1
        for found in package["vulns"]:
            ids = [found["id"], *found.get("aliases", [])]
            fixed = ", ".join(found.get("fix_versions", [])) or "none yet"
            line = f"{package['name']} {package['version']}: {', '.join(ids)}; fixed in {fixed}"
            accepted = [ACCEPTED[name] for name in ids if name in ACCEPTED]
            if accepted or canonicalize_name(package["name"]) not in direct:
                remarks.append(f"{line} ({accepted[0]})" if accepted else line)
            else:
                failures.append(line)
    return failures, remarks, num_audited


def direct_requirements(setup_cfg: str) -> set[str]:
    """Return the canonical names of all requirements in a setup.cfg."""
    found = re.findall(r"^    ([A-Za-z0-9][\w.-]*) *[<>=]=", setup_cfg, re.MULTILINE)
    return {canonicalize_name(name) for name in found}


def ask_database(program: str, lock: Path) -> tuple[dict[str, Any] | None, str]:
    """Return pip-audit's report, None with its complaint when there is none."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        command = [program, "--no-deps", "--disable-pip", "--requirement", str(lock)]
        command += ["--format", "json", "--output", str(out), "--progress-spinner", "off"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            return None, str(error)
        if not out.is_file():
            return None, (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        report: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return report, ""


def main(program: str) -> int:
    """Check the lock and ask the database; return 1 for a loose lock or our own vulnerability."""
    lock = ROOT / "constraints.txt"
    direct = direct_requirements((ROOT / "setup.cfg").read_text(encoding="utf-8"))
    failures = find_loose(lock.read_text(encoding="utf-8"), needed_packages(direct))
    report, complaint = ask_database(program, lock)
    found, remarks, num_audited = judge(report, direct) if report else ([], [], 0)
    if num_audited == 0:
        reason = complaint or (remarks or ["no package was found there"])[0]
        print(f"warning: NOT AUDITED, the database of vulnerabilities gave nothing: {reason}")
    else:
        print("\n".join([*remarks, f"{num_audited} packages audited"]))
    for failure in failures + found:
        print(f"FAILED: {failure}")
    state = "not whole" if failures else "whole"
    print(f"the lock is {state}; {len(found)} vulnerabilities in what we require ourselves")
    return 1 if failures + found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
