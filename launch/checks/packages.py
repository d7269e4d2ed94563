"""Python and its packages against what setup.cfg asks for and constraints.txt was tested with."""

from __future__ import annotations

import configparser
import importlib.metadata
import platform
from dataclasses import dataclass, field
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from launch import ROOT
from launch.checks.finding import Finding, error, ok, warning

TOPIC = "environment"
INSTALL = "make install, or pip install -c constraints.txt -e . in the environment of the job"


@dataclass(frozen=True)
class PackageFacts:
    """Versions: installed, allowed and tested.

    Attributes:
        python: of this interpreter.
        python_range: ``python_requires``.
        installed: version by package; None where it is missing.
        ranges: what setup.cfg allows, by package; empty where there is no setup.cfg.
        tested: the exact versions of constraints.txt, by package.
    """

    python: str
    python_range: str = ""
    installed: dict[str, str | None] = field(default_factory=dict)
    ranges: dict[str, str] = field(default_factory=dict)
    tested: dict[str, str] = field(default_factory=dict)


def gather(root: Path = ROOT) -> PackageFacts:
    """Read setup.cfg and constraints.txt of the checkout, and what is installed."""
    python_range, ranges = read_ranges(root / "setup.cfg")
    return PackageFacts(
        python=platform.python_version(),
        python_range=python_range,
        installed={name: _installed(name) for name in ranges},
        ranges=ranges,
        tested=read_pins(root / "constraints.txt"),
    )


def read_ranges(path: Path) -> tuple[str, dict[str, str]]:
    """Return ``python_requires`` and the range of every package; a snapshot has no such file."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(path, encoding="utf-8")
    lines = parser.get("options", "install_requires", fallback="").splitlines()
    wanted = [Requirement(line) for line in lines if line.strip()]
    python = parser.get("options", "python_requires", fallback="")
    return python, {item.name: str(item.specifier) for item in wanted}


def read_pins(path: Path) -> dict[str, str]:
    """Return the exact version of every package that is meant for this Python."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    environment = {key: str(value) for key, value in default_environment().items()}
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(environment)]
    return {pin.name: next(iter(pin.specifier)).version for pin in here}


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def judge(facts: PackageFacts) -> list[Finding]:
    """Compare versions with the ranges and with the tested ones."""
    findings = [_judge_python(facts)]
    if not facts.ranges:
        return [*findings, ok(TOPIC, "no setup.cfg beside the code: package versions not compared")]
    missing = [name for name, version in facts.installed.items() if version is None]
    wrong = [
        f"{name} {version} (needs {facts.ranges[name]})"
        for name, version in facts.installed.items()
        if version is not None and not _is_in(version, facts.ranges[name])
    ]
    if missing:
        why = "a stage that imports one of them ends at once"
        findings.append(error(TOPIC, f"not installed: {', '.join(missing)}", why, INSTALL))
    if wrong:
        why = "interfaces that the code uses differ outside these ranges"
        findings.append(error(TOPIC, f"outside setup.cfg: {', '.join(wrong)}", why, INSTALL))
    if not missing and not wrong:
        findings.append(ok(TOPIC, f"{len(facts.ranges)} packages are in the ranges of setup.cfg"))
    return [*findings, *_judge_pins(facts)]


def _judge_python(facts: PackageFacts) -> Finding:
    what = f"Python {facts.python}"
    if _is_in(facts.python, facts.python_range):
        return ok(TOPIC, what)
    remedy = "load a newer Python module and make a new environment with make install PYTHON=..."
    return error(TOPIC, what, f"the code needs {facts.python_range}", remedy)


def _judge_pins(facts: PackageFacts) -> list[Finding]:
    other = [
        f"{name} {version} (tested {facts.tested[name]})"
        for name, version in facts.installed.items()
        if version and facts.tested.get(name, version) != version.partition("+")[0]
    ]
    if not other:
        return []
    why = "allowed by setup.cfg, but the tests passed with other versions"
    return [warning(TOPIC, f"not the tested versions: {', '.join(other)}", why, INSTALL)]


def _is_in(version: str, allowed: str) -> bool:
    return SpecifierSet(allowed).contains(version, prereleases=True)
