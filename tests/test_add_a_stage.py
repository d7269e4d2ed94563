"""docs/add_a_stage.md, followed in a copy of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/add_a_stage.md"
PARTS = ("trainer", "launch", "tokenizer", "conf", "tests", "pyproject.toml", "setup.cfg")
# "In `FILE`:" or "At the end of `FILE`:", then a block.
BLOCK = re.compile(r"(In|At the end of) `([\w./]+)`:\n\n```(?:python|yaml)\n(.*?)```", re.DOTALL)


def run(folder: Path, command: list[str]) -> str:
    environ = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_loss_is_added_as_the_page_says(tmp_path: Path) -> None:
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / part)
    page = PAGE.read_text(encoding="utf-8")
    blocks = BLOCK.findall(page)
    assert [Path(name).suffix for _, name, _ in blocks] == [".py", ".yaml", ".py"]
    for where, name, text in blocks:
        path = tmp_path / name
        assert path.exists() == (where == "At the end of")
        with path.open("a", encoding="utf-8") as file:
            file.write(f"\n\n{text}" if path.suffix == ".py" and path.stat().st_size else text)
    [commands] = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    for command in commands.splitlines():
        python, *words = command.split()
        assert python == "python"
        output = run(tmp_path, [sys.executable, *words, "-q", "-p", "no:cacheprovider"])
        assert re.search(r"[1-9]\d* passed", output), output
    helped = run(tmp_path, [sys.executable, "-m", "launch", "run", "--help"])
    assert "exponential " in helped
    compose = "from launch.compose import compose_values as c; print(c(['stage=dpo', "
    compose += "'loss=exponential', 'model=folder', 'model.path=x'])['stage']['objective'])"
    composed = run(tmp_path, [sys.executable, "-c", compose])
    assert composed.strip() == "{'name': 'exponential', 'beta': 0.1}"
