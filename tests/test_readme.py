"""Every command of the README runs, in the order in which a reader would type it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COPIED = ("launch", "trainer", "tokenizer", "conf", "slurm", "samples", "tests", "benchmarks")
COPIED_FILES = ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt", "README.md")
BLOCK = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Return the fenced command blocks of the README."""
    return [body for language, _, body in BLOCK.findall(README) if language == "bash"]


def table_after(header: str) -> list[list[str]]:
    """Return the cells of the README's table whose first header cell is ``header``."""
    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {header} "))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the working tree with this environment as its ``.venv``."""
    if not all((Path(sys.prefix) / "bin" / name).exists() for name in ("activate", "kuroshio")):
        pytest.skip("the tests run outside an environment made by make")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in COPIED:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=unwanted)
    for name in COPIED_FILES:
        shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


def test_commands_run(checkout: Path) -> None:
    """Run all blocks in one shell; ``make`` only prints what it would do, or this would recurse."""
    environ = {**os.environ, "PYTHONPATH": str(checkout), "MAKEFLAGS": "n"}
    script = "set -euxo pipefail\n" + "\n".join(commands())
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=checkout,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "samples/demo.py" in done.stdout and "-m pytest" in done.stdout
    runs = checkout / "runs/quick"
    assert (runs / "vocab/audit.html").is_file()
    assert (runs / "two/report.html").is_file()
    answers = (runs / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(answers) == 4 and (runs / "adapter/adapter_config.json").is_file()
    assert (runs / "model/model.safetensors").is_file() or list((runs / "model").glob("*.index*"))
    for name in ("one", "two", "torchrun", "deepspeed", "chat"):
        assert list((runs / name / "checkpoints").glob("step_*")), name


def test_every_fence_has_a_language() -> None:
    assert all(language for language, _, _ in BLOCK.findall(README))


def test_groups_are_those_of_conf() -> None:
    documented = {}
    for group, options in table_after("group"):
        documented[group.strip("`")] = set(
            re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", options))
        )
    defaults = yaml.safe_load((ROOT / "conf/run.yaml").read_text(encoding="utf-8"))["defaults"]
    groups = [name for entry in defaults if isinstance(entry, dict) for name in entry]
    present = {g: {path.stem for path in (ROOT / "conf" / g).glob("*.yaml")} for g in groups}
    assert documented == present


def test_engines_are_those_of_conf() -> None:
    names = {re.findall(r"`(\w+)`", row[0])[0] for row in table_after("`engine=`")}
    assert names == {path.stem for path in (ROOT / "conf/engine").glob("*.yaml")}


def test_exit_codes_are_those_of_the_errors() -> None:
    from trainer import errors

    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    codes = {c.exit_code for c in classes if c is not errors.KuroshioError}
    assert {int(row[0]) for row in table_after("exit code")} == codes | {0}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^):#]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()
