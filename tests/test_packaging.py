"""What setup.cfg, constraints.txt and the Makefile promise about an installation."""

from __future__ import annotations

import configparser
import re
import subprocess
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("launch", "trainer", "tokenizer")


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(text: str) -> list[Requirement]:
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return [Requirement(line) for line in lines if line]


def pins() -> dict[str, Requirement]:
    """Return the exact versions of constraints.txt that count for this Python."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return {
        canonicalize_name(pin.name): pin
        for pin in requirements(text)
        if Marker(str(pin.marker or 'python_version > "0"')).evaluate()
    }


def test_data_files_of_packages_ship() -> None:
    patterns = {key: value.split() for key, value in setup_cfg()["options.package_data"].items()}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            if not path.is_file() or path.suffix in (".py", ".pyc"):
                continue
            owner = next(folder for folder in path.parents if (folder / "__init__.py").exists())
            named = patterns.get(".".join(owner.relative_to(ROOT).parts), [])
            assert any(fnmatch(str(path.relative_to(owner)), p) for p in named), path


def test_every_package_has_an_init() -> None:
    for package in PACKAGES:
        for folder in {path.parent for path in (ROOT / package).rglob("*.py")}:
            assert (folder / "__init__.py").is_file(), f"setup.cfg's find: would leave out {folder}"


def test_pins_lie_within_the_ranges() -> None:
    config, pinned = setup_cfg(), pins()
    wanted = requirements(config["options"]["install_requires"])
    wanted += requirements(config["options.extras_require"]["test"])
    for requirement in wanted:
        if requirement.marker is None or requirement.marker.evaluate():
            pin = pinned[canonicalize_name(requirement.name)]
            exact = next(iter(pin.specifier)).version
            assert requirement.specifier.contains(exact), f"{requirement} against {pin}"


def test_installed_versions_are_the_pinned_ones() -> None:
    if not (ROOT / ".venv/.installed").exists():
        pytest.skip("this environment was not made by make install")
    for name in ("torch", "deepspeed", "transformers", "hydra-core"):
        assert version(name).partition("+")[0] == next(iter(pins()[name].specifier)).version


def test_nothing_names_a_package_index() -> None:
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|index-url|find-links", text), name


def test_ci_script_parses() -> None:
    done = subprocess.run(["bash", "-n", ROOT / ".ci/run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_old_python_is_refused_by_make(tmp_path: Path) -> None:
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.2\nexit 1\n')
    python.chmod(0o755)
    command = ["make", "install", f"PYTHON={python}", f"VENV={tmp_path}/venv"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Python 3.10 or newer is needed" in done.stderr and "3.8.2" in done.stderr
    assert not (tmp_path / "venv").exists()
