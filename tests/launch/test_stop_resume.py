"""`kuroshio stop` and `kuroshio resume`: what they do to a run in each state."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from run_folders import RunFolder, fake_commands

from launch import ROOT, resume, stop
from launch.graph.state import PipelineState, StepState, write_state
from trainer.errors import ConfigError, StorageError

RUNNING = "7|7|RUNNING|N/A|N/A|None|n[1-2]"
PENDING = "7|7|PENDING|N/A|N/A|Priority|"


@pytest.fixture(autouse=True)
def _stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path.cwd())  # brought back after the test: resume goes elsewhere


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run", time.time())
    return run.life(900, job="7").train(120, 1).save(100, 60).submitted("7")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of commands; without any added there is no Slurm."""
    folder = fake_commands(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{folder}:/bin")
    for name in ("squeue", "scancel", "sbatch"):
        if any((Path(place) / name).exists() for place in ("/bin", "/usr/bin")):
            fake_commands(folder, **{name: ""})
    return folder


def calls(slurm: Path) -> list[str]:
    path = slurm / "calls"
    return [c for c in path.read_text().splitlines() if "squeue" not in c] if path.exists() else []


def test_stop_of_a_running_job_leaves_a_request(
    run: RunFolder, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_commands(slurm, squeue=RUNNING)
    assert stop.main([str(run.path)]) == 0
    assert (run.path / "stop").exists() and calls(slurm) == []
    out = capsys.readouterr().out
    assert "after the step that follows 120 (about 0:00:02 a step) all ranks save" in out
    assert f"`kuroshio resume {run.path}` goes on" in out


def test_stop_of_a_waiting_job_cancels_it(
    run: RunFolder, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_commands(slurm, squeue=PENDING, scancel="")
    assert stop.main([str(run.path)]) == 0
    assert calls(slurm) == ["scancel --state=PENDING 7"]
    assert "job 7 waited and is cancelled" in capsys.readouterr().out
    assert not (run.path / "stop").exists()


def test_stop_of_a_job_that_begins_meanwhile(
    run: RunFolder, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = f'case "$*" in *--jobs=7*) echo 7 RUNNING ;; *) echo "{PENDING}" ;; esac'
    fake_commands(slurm, scancel="")
    (slurm / "squeue").write_text(f"#!/bin/sh\n{answer}\n")
    (slurm / "squeue").chmod(0o755)
    assert stop.main([str(run.path)]) == 0
    assert (run.path / "stop").exists()
    assert "all ranks save" in capsys.readouterr().out


def test_stop_does_not_say_that_nothing_waits_where_nobody_knows(
    run: RunFolder, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.end(60, 75, reason="time limit", decision="requeue")
    fake_commands(slurm, squeue="")
    (slurm / "squeue").write_text("#!/bin/sh\necho 'no controller' >&2\nexit 1\n")
    assert stop.main([str(run.path)]) == 0
    assert "requeued: whether job 7 waits is unknown; try again" in capsys.readouterr().out


def test_stop_where_nothing_runs_changes_nothing(
    run: RunFolder, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.end(60, 76, reason="loss is NaN")
    assert stop.main([str(run.path)]) == 0
    assert "failed: nothing runs" in capsys.readouterr().out
    assert not (run.path / "stop").exists() and calls(slurm) == []


def test_stop_of_a_local_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(tmp_path / "local", time.time()).life(60).hold(2)
    stop.main([str(run.path)])
    assert (run.path / "stop").exists()
    assert "after the step that follows the present one all ranks save" in capsys.readouterr().out


def test_stop_of_a_stage_without_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(tmp_path / "v", time.time(), stage={"name": "vocab"}).life(60).hold(2)
    stop.main([str(run.path)])
    assert not (run.path / "stop").exists()
    assert "stage vocab has no steps to stop between" in capsys.readouterr().out


def test_stop_that_cannot_be_written_or_cancelled(run: RunFolder, slurm: Path) -> None:
    fake_commands(slurm, squeue=PENDING)
    (slurm / "scancel").write_text("#!/bin/sh\necho 'Access denied' >&2\nexit 1\n")
    with pytest.raises(ConfigError, match="scancel 7 failed: Access denied"):
        stop.main([str(run.path)])
    fake_commands(slurm, squeue=RUNNING)
    (run.path / "stop").symlink_to("/nowhere/at/all")
    with pytest.raises(StorageError, match="cannot be written"):
        stop.main([str(run.path)])


def test_stop_of_a_pipeline_begins_with_the_children(
    run: RunFolder, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    top = run.path.parent
    fake_commands(slurm, squeue=f"{RUNNING}\n{PENDING.replace('7', '8')}", scancel="")
    steps = {
        "run": StepState("run", "sft", str(run.path), [], "submitted", "7"),
        "model": StepState("export", None, str(top / "model"), ["run"], "submitted", "8"),
    }
    write_state(top, PipelineState("demo", "f", [], "submit", "t", steps))
    assert stop.main([str(top)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{top}/model: job 8 waited") and "all ranks save" in lines[1]


def test_a_folder_of_runs_is_not_stopped_at_once(run: RunFolder) -> None:
    with pytest.raises(ConfigError, match=r"stop one of those below it: .*/run"):
        stop.main([str(run.path.parent)])


@pytest.mark.parametrize(
    ("line", "words"), [(RUNNING, r"running: job 7 on n\[1-2\]"), (PENDING, "requeued: job 7")]
)
def test_resume_is_refused_while_the_job_lives(
    run: RunFolder, slurm: Path, line: str, words: str
) -> None:
    fake_commands(slurm, squeue=line, sbatch="99")
    (run.path / "job.sbatch").touch()
    with pytest.raises(ConfigError, match=rf"is {words} has it; .*kuroshio stop"):
        resume.main([str(run.path)])
    assert calls(slurm) == []


def test_resume_is_refused_while_nobody_knows(run: RunFolder, slurm: Path) -> None:
    (slurm / "squeue").write_text("#!/bin/sh\necho 'no controller' >&2\nexit 1\n")
    with pytest.raises(ConfigError, match=r"no controller; whether job 7 of .* is unknown"):
        resume.main([str(run.path)])


def test_resume_submits_the_script_again(
    run: RunFolder, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.end(60, 75)
    (run.path / "stop").touch()
    (run.path / "job.sbatch").touch()
    fake_commands(slurm, squeue="", sbatch="99")
    assert resume.main([str(run.path)]) == 0
    # What the run waited for before its first life may have failed and been made anew since.
    assert calls(slurm) == [f"sbatch --parsable --dependency= {run.path}/job.sbatch"]
    assert json.loads((run.path / "submit.json").read_text())["job_ids"] == ["7", "99"]
    assert not (run.path / "stop").exists()
    assert f"job 99 resumes {run.path} at step 100" in capsys.readouterr().out


def test_a_run_that_never_began_waits_for_its_parents_again(tmp_path: Path, slurm: Path) -> None:
    run = RunFolder(tmp_path / "run", time.time()).submitted("7")
    (run.path / "job.sbatch").touch()
    fake_commands(slurm, squeue="", sbatch="99")
    assert resume.main([str(run.path)]) == 0
    assert calls(slurm) == [f"sbatch --parsable {run.path}/job.sbatch"]


def test_resume_of_a_folder_that_was_moved(run: RunFolder, slurm: Path) -> None:
    run.end(60, 75)
    (run.path / "job.sbatch").write_text("#!/bin/bash\nRUN=/old/place\nCODE=/old/place/code\n")
    fake_commands(slurm, squeue="", sbatch="99")
    with pytest.raises(ConfigError, match=r"was /old/place .*submit --config .*config.yaml"):
        resume.main([str(run.path)])
    assert calls(slurm) == []


def test_resume_goes_back_to_where_the_run_was_started(
    run: RunFolder, slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths of data are seen from there."""
    there = tmp_path / "there"
    there.mkdir()
    run.end(60, 75).submitted("7", directory=str(there))
    (run.path / "job.sbatch").touch()
    fake_commands(slurm, squeue="", sbatch="99")
    (slurm / "sbatch").write_text(f"#!/bin/sh\npwd > {slurm}/where\necho 99\n")
    monkeypatch.chdir(run.path.parent)
    assert resume.main(["run"]) == 0
    assert (slurm / "where").read_text().strip() == str(there)
    monkeypatch.chdir(run.path.parent)
    run.submitted("7", directory="/nowhere/at/all")
    with pytest.raises(ConfigError, match="was started in /nowhere/at/all, which does not exist"):
        resume.main(["run"])


def test_resume_of_a_task_of_a_sweep(run: RunFolder, slurm: Path) -> None:
    run.end(60, 75).submitted("7_1")
    fake_commands(slurm, squeue="")
    with pytest.raises(ConfigError, match=r"kuroshio submit --config .*/run/config.yaml"):
        resume.main([str(run.path)])


def test_resume_of_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(tmp_path / "done", time.time()).life(60).train(400, 10).save(400).end(1, 0)
    assert resume.main([str(run.path)]) == 0
    assert "is finished at step 400: nothing to do" in capsys.readouterr().out


def test_resume_of_a_local_run_becomes_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path / "local", time.time()).train(5, 10)
    run.life(60, directory=str(tmp_path)).end(1, 75)
    monkeypatch.chdir("/")
    became: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *words: became.append(words))
    resume.main([str(run.path)])
    words = [sys.executable, "-m", "launch", "run", "--config", str(run.path / "config.yaml")]
    (program, called, environ) = became[0]
    assert (program, called) == (sys.executable, words) and Path.cwd() == tmp_path
    assert environ["PYTHONPATH"].startswith(str(ROOT))


def test_resume_of_a_local_run_that_lives(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "local", time.time()).life(60).hold(2)
    with pytest.raises(ConfigError, match="is running: a process on n1 has it"):
        resume.main([str(run.path)])
