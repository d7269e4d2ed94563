"""Jobs submitted in the other ways: by hand, in an image, as an array, and refused ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from cluster_runs import Runs

from launch import ROOT, submission
from launch.job_folder import read_submission
from launch.run_folder import read
from trainer.errors import ConfigError
from trainer.lives import newest_step, read_lives

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
# An image that is only a name: what is started in it finds no command of Slurm.
APPTAINER = """#!/bin/bash
[ "$1" = exec ] || exit 3
while [ "${1##*.}" != sif ]; do shift; done
shift
PATH=$INSIDE exec "$@"
"""


def words_of(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Return a plain config as overrides."""
    words = []
    for key, value in values.items():
        if isinstance(value, dict):
            words += words_of(value, f"{prefix}{key}.")
        elif prefix + key not in ("model.name", "stage.name"):
            words.append(f"++{prefix}{key}={json.dumps(value)}")
    return words


def test_a_script_submitted_by_hand(runs: Runs, cluster: Cluster, tmp_path: Path) -> None:
    values = runs.values(tmp_path / "run")
    del values["cluster"]
    values["loop"] |= {"max_steps": 3, "save_every": 0}
    done = subprocess.run(
        ["sbatch", "--parsable", "--account=MST109001", "--nodes=2", "--ntasks-per-node=1",
         "--gres=gpu:1", "--cpus-per-task=1", "--mem=0", "--time=00:05:00",
         f"--output={tmp_path}/hand-%j.out", "slurm/train.sbatch", "cluster=local_slurm",
         *words_of(values)],
        cwd=ROOT, capture_output=True, text=True,
        env={**cluster.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    cluster.wait(job, "COMPLETED")
    frozen = read(tmp_path / "run/config.yaml")["cluster"]
    assert (frozen["nodes"], frozen["gpus_per_node"]) == (2, 1)
    assert read_submission(tmp_path / "run")["job_ids"] == [job]
    assert [life["decision"] for life in read_lives(tmp_path / "run")] == ["done"]
    assert newest_step(tmp_path / "run") == 3
    assert (tmp_path / "run/logs/rank_00001.log").exists()


def test_words_that_are_wrong_end_a_job_by_hand(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(
        (ROOT / "slurm/train.sbatch").read_text(encoding="utf-8"),
        "--account=MST109001", "--ntasks-per-node=1", "--gres=gpu:1", "--cpus-per-task=1",
        "--mem=0", f"--output={tmp_path}/%j.out", f"--chdir={ROOT}",
    )  # fmt: skip
    assert cluster.wait(job, "FAILED")["ExitCode"] == "78:0"


def test_an_image_is_started_again_and_requeued_from_outside(
    runs: Runs, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (outside / "apptainer").write_text(APPTAINER, encoding="utf-8")
    (outside / "apptainer").chmod(0o755)
    for name in ("bash", "env"):
        (inside / name).symlink_to(f"/bin/{name}")
    (inside / "python").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n', encoding="utf-8")
    (inside / "python").chmod(0o755)
    (tmp_path / "image.sif").touch()
    text = APPTAINER.replace("$INSIDE", str(inside))
    (outside / "apptainer").write_text(text, encoding="utf-8")
    monkeypatch.setenv("PATH", f"{outside}:{os.environ['PATH']}")
    values = runs.values(tmp_path / "run", image=str(tmp_path / "image.sif"))
    values["loop"] |= {"max_steps": 3, "save_every": 1}
    job = runs.submit(values, attempts=99, kill_at=0)
    cluster.wait_for_restart(job)
    cluster.wait(job, "COMPLETED")
    lives = read_lives(tmp_path / "run")
    assert [life["decision"] for life in lives] == ["restart", "requeue", "done"]


def test_an_array_runs_as_many_tasks_at_once_as_asked(
    runs: Runs, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(cluster.config_path))
    drafts = []
    for seed in (1, 2):
        values = runs.values(tmp_path / f"seed{seed}", nodes=1)
        values["loop"] |= {"max_steps": 2, "save_every": 0, "seed": seed}
        drafts.append(submission.draft(values, tmp_path / f"seed{seed}"))
    array = submission.submit_array(drafts, tmp_path / "sweep", at_once=1)
    for task in (0, 1):
        cluster.wait(f"{array}_{task}", "COMPLETED")
    lives = [read_lives(tmp_path / f"seed{seed}")[0] for seed in (1, 2)]
    assert [life["exit_code"] for life in lives] == [0, 0]
    assert lives[0]["ended"] <= lives[1]["started"]  # one at a time


def test_what_the_profile_refuses_slurm_never_sees(
    runs: Runs, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(cluster.config_path))
    before = cluster.call("squeue", "--noheader", "--states=all")
    site = submission_site()
    for wrong, words in (
        ({"account": None}, "cluster.account"),
        ({"partition": "gp3d"}, "gtest, gp1d"),
        ({"partition": "express"}, "industrial"),
        ({"time": "00:31:00"}, "0.5 hours"),
        ({"nodes": 6, "gpus_per_node": 8}, "40 at most"),
    ):
        values = runs.values(tmp_path / "run", **wrong)
        values["cluster"]["site"] = site
        with pytest.raises(ConfigError, match=words):
            submission.submit_run(values, tmp_path / "run")
    assert cluster.call("squeue", "--noheader", "--states=all") == before


def test_what_only_slurm_knows_is_said_in_its_words(
    runs: Runs, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(cluster.config_path))
    values = runs.values(tmp_path / "run", account="nobody")
    with pytest.raises(ConfigError, match=r"Slurm refuses the job: .*Account required"):
        submission.submit_run(values, tmp_path / "run")


def submission_site() -> dict[str, Any]:
    """Return the facts of Taiwania 2, which the cluster imitates."""
    from launch.compose import compose_values

    site: dict[str, Any] = compose_values(["cluster=taiwania2"])["cluster"]["site"]
    return site
