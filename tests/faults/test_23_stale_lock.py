"""Row 23: torch's lock of a build whose process was killed lies where the next one would wait."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from probe_runs import ROOT

from trainer.engine import ops

TIMEOUT_S = 400  # a rebuild on a busy machine; torch itself waits for ever


@pytest.mark.faults(row=23)
@pytest.mark.slow
@pytest.mark.usefixtures("cpu_adam")
def test_the_lock_of_a_killed_build_holds_nobody_up(tmp_path: Path) -> None:
    folder = tmp_path / "cpu_adam"
    shutil.copytree(Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "cpu_adam", folder)
    builder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / ops.CLAIM).write_text(json.dumps({"host": socket.gethostname(), "pid": builder.pid}))
    (folder / "lock").touch()
    builder.kill()
    builder.wait()
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "build_ops.py"), "cpu_adam"],
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"cpu_adam: ready in {tmp_path}" in done.stdout
    assert f"removing the lock of a dead build in {folder}" in done.stderr
    assert not (folder / "lock").exists() and not (folder / ops.CLAIM).exists()
