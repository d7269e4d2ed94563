"""watch, logs, stop and resume with a run that Slurm really runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from cluster_runs import Runs, read_step, wait_until

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slurm, pytest.mark.slow]


class Login:
    """A shell on the login node."""

    def __init__(self, cluster: Cluster, run_dir: Path) -> None:
        self.environ = cluster.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
        self.run_dir = run_dir

    def call(self, verb: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launch", verb, str(self.run_dir), *words]
        return subprocess.run(
            command, env=self.environ, cwd=ROOT, capture_output=True, text=True, timeout=120
        )

    def say(self, verb: str, *words: str) -> str:
        done = self.call(verb, *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def watch(self) -> dict[str, Any]:
        (run,) = json.loads(self.say("watch", "--json"))["runs"]
        return run


def test_a_run_is_watched_stopped_and_resumed(runs: Runs, cluster: Cluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    prices = [{"who": "all", "currency": "TWD", "per_gpu_hour": 3600.0, "source": "-", "date": "-"}]
    values = runs.values(run_dir, time="00:10:00")
    values["cluster"]["site"]["prices"] = prices
    job = runs.submit(values, from_step=4, step_s=3.0)
    login = Login(cluster, run_dir)
    assert login.watch()["state"] in ("pending", "running")
    wait_until(lambda: read_step(run_dir) >= 4, "step 4")

    run = login.watch()
    assert (run["state"], run["job"], run["max_steps"]) == ("running", job, 16)
    assert run["nodes"] == "n[1-2]" and 4 <= run["step"] < 16
    assert 300 < run["limit_s"] <= 600 and run["figures"]["loss"] > 0 and run["problems"] == []
    assert run["costs"][0]["amount"] == pytest.approx(3600 * run["gpu_hours"]) and run["gpu_hours"]
    refused = login.call("resume")
    assert refused.returncode == 78 and f"job {job} on n[1-2] has it" in refused.stderr
    assert "step 4/16" in login.say("logs", "--rank", "0", "--lines", "1000")
    assert (run_dir / "logs" / "rank_00001.log").exists()

    assert "all ranks save and leave" in login.say("stop")
    assert login.watch()["state"] in ("stopping", "stopped")
    cluster.wait(job, "FAILED", "COMPLETED")
    run = login.watch()
    assert (run["state"], run["num_lives"]) == ("stopped", 1)
    assert run["saved_step"] == read_step(run_dir) < 16 and not (run_dir / "stop").exists()
    assert "leave: stopped by the stop file" in login.say("logs")

    (run_dir / "code" / "brake.json").unlink()
    assert f"at step {run['saved_step']}" in login.say("resume")
    again = login.watch()["job"]
    assert again != job
    cluster.wait(again, "COMPLETED", timeout_s=300)
    run = login.watch()
    assert (run["state"], run["step"], run["num_lives"]) == ("finished", 16, 2)
    assert "stopped by the stop file" in run["ends"][0] and run["eta_s"] is None
    assert "finished" in login.say("watch", "--once") and "nothing to do" in login.say("resume")
    assert "nothing runs" in login.say("stop")


def test_a_job_that_waits_is_cancelled(runs: Runs, cluster: Cluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = runs.submit(runs.values(tmp_path / "parent"))
    cluster.call("scontrol", "hold", first)
    job = runs.submit(runs.values(run_dir))
    cluster.call("scontrol", "hold", job)
    login = Login(cluster, run_dir)
    run = login.watch()
    assert (run["state"], run["note"], run["job"]) == ("held", "JobHeldAdmin", job)  # by root
    assert login.call("resume").returncode == 78
    assert f"job {job} waited and is cancelled" in login.say("stop")
    cluster.wait(job, "CANCELLED")
    assert login.watch()["state"] == "stopped"
    assert cluster.show(first)["JobState"] == "PENDING"  # nobody else's job was touched
    again = login.say("resume").split()[1]
    assert int(again) > int(job) and login.watch()["state"] in ("pending", "running")
