"""What becomes of a job whose ranks have ended."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch import job_end
from launch.job_end import LifeEnd, count_idle_lives, decide, first_steps
from trainer import errors
from trainer.errors import EXIT_RESUME, KuroshioError
from trainer.lease import Lease
from trainer.lives import append_line, read_lives

ROOT = Path(__file__).resolve().parents[2]
STOPPED = LifeEnd(
    code=143,
    exit_code=75,
    reason="stopped by SIGUSR1 after step 40, saved",
    cause="SIGUSR1",
    was_stopped=False,
    state="RUNNING",
    num_lives=2,
    num_idle_lives=0,
    step=40,
    has_started=True,
    has_time=True,
    max_lives=20,
    max_idle_lives=3,
)


@pytest.mark.parametrize(
    ("changes", "action", "code", "words"),
    [
        ({}, "requeue", 75, "SIGUSR1 after step 40, saved (exit 75). Life 3 of at most 20"),
        ({"code": 0, "exit_code": 0}, "done", 0, "finished at step 40"),
        ({"code": 0, "exit_code": None}, "done", 0, "finished"),
        ({"code": 137, "exit_code": None, "reason": ""}, "restart", 101, "killed by signal 9"),
        ({"code": 143, "exit_code": None, "reason": ""}, "restart", 101, "killed by signal 15"),
        ({"code": 1, "exit_code": None, "reason": ""}, "restart", 101, "srun exited 1"),
        ({"exit_code": 69, "reason": "lost n2"}, "restart", 101, "lost n2 (exit 69). Life 3"),
        ({"exit_code": 0, "reason": "finished"}, "restart", 101, "step 40, in this job"),
        ({"exit_code": 69, "state": None}, "requeue", 75, "resumes at step 40"),
        ({"exit_code": 69, "has_started": False}, "requeue", 75, "resumes at step 40"),
        ({"exit_code": 69, "state": "COMPLETING"}, "leave", 69, "COMPLETING"),
        ({"exit_code": 69, "num_idle_lives": 1}, "restart", 101, "in this job"),
        ({"exit_code": 69, "num_idle_lives": 2}, "requeue", 75, "resumes at step 40"),
        ({"exit_code": 69, "num_idle_lives": 3}, "give up", 69, "3 lives in a row"),
        ({"exit_code": 69, "has_time": False}, "requeue", 75, "resumes at step 40"),
        ({"exit_code": 69, "num_lives": 20}, "give up", 69, "life 20 of cluster.max_lives=20"),
        ({"exit_code": 72}, "requeue", 75, "resumes at step 40"),
        ({"code": 75}, "requeue", 75, "resumes at step 40"),
        ({"code": 137, "cause": ""}, "restart", 101, "in this job"),  # killed before the first step
        ({"code": 137}, "requeue", 75, "resumes at step 40"),  # killed after the save, in its end
        ({"exit_code": 65, "reason": "bad row"}, "give up", 65, "bad row (exit 65). No retry"),
        ({"exit_code": 66}, "give up", 66, "restore the checkpoint"),
        ({"exit_code": 71}, "give up", 71, "same checkout"),
        ({"exit_code": 73}, "give up", 73, "another life"),
        ({"exit_code": 74}, "give up", 74, "free space"),
        ({"exit_code": 76}, "give up", 76, "would replay"),
        ({"exit_code": 78}, "give up", 78, "mend the configuration"),
        ({"code": 78, "exit_code": None, "reason": ""}, "give up", 78, "No retry cures"),
        ({"was_stopped": True}, "leave", 75, "`kuroshio resume` goes on"),
        ({"state": "COMPLETING"}, "leave", 75, "COMPLETING, so Slurm decides"),
        ({"state": ""}, "leave", 75, "gone from the queue"),
        ({"state": None}, "requeue", 75, "Life 3"),
        ({"num_lives": 19}, "requeue", 75, "Life 20 of at most 20"),
        ({"num_lives": 20}, "give up", 75, "life 20 of cluster.max_lives=20"),
        ({"num_idle_lives": 2}, "requeue", 75, "Life 3"),
        ({"num_idle_lives": 3}, "give up", 75, "3 lives in a row committed no checkpoint after"),
        ({"num_idle_lives": 3, "code": 0}, "done", 0, "finished"),
    ],
)
def test_decisions(changes: dict[str, Any], action: str, code: int, words: str) -> None:
    decision = decide(dataclasses.replace(STOPPED, **changes))
    assert (decision.action, decision.exit_code) == (action, code)
    assert words in decision.reason


def test_every_exit_code_of_an_error_is_decided_on() -> None:
    """A new error must say whether a retry cures it."""
    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    codes = {c.exit_code for c in classes if issubclass(c, KuroshioError)}
    retried = {EXIT_RESUME, errors.LostRankError.exit_code, KuroshioError.exit_code}
    retried |= {errors.CorruptionError.exit_code}
    retried |= {errors.PortTakenError.exit_code}
    assert codes == retried | set(job_end.FINAL)


@pytest.mark.parametrize(
    ("begun", "this", "expected"),
    [
        ({(0, 0): 0}, (0, 0), [0]),
        ({(0, 0): 0, (2, 0): 0}, (2, 0), [0, None, 0]),  # life 1 died before it began
        ({}, (1, 0), [None, None]),
        ({(0, 0): 0, (0, 1): 8, (0, 3): 9}, (0, 3), [0, 8, None, 9]),
        ({(0, 0): 0, (0, 1): 8, (1, 0): 9}, (1, 1), [0, 8, 9, None]),
    ],
)
def test_lives_of_a_job_are_counted(
    begun: dict[tuple[int, int], int], this: tuple[int, int], expected: list[int | None]
) -> None:
    lives = [{"restart": r, "attempt": a, "first_step": s} for (r, a), s in begun.items()]
    assert first_steps(lives, {"restart": this[0], "attempt": this[1]}) == expected


@pytest.mark.parametrize(
    ("starts", "step", "expected"),
    [([0], 0, 1), ([0], 40, 0), ([0, 40, 40], 40, 2), ([0, 40, 40], 60, 0), ([0, None, 0], 0, 3)],
)
def test_idle_lives_are_counted_back(starts: list[int | None], step: int, expected: int) -> None:
    assert count_idle_lives(starts, step) == expected


@pytest.fixture
def in_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run folder inside job 17, whose Slurm writes down what it is asked."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setattr(job_end, "REQUEUE_WAIT_S", 0)
    monkeypatch.setattr(job_end, "RETRY_AFTER_S", (0, 0))
    commands = tmp_path / "bin"
    commands.mkdir()
    scripts = {"squeue": "echo 17 RUNNING", "scontrol": f'echo "$@" >>{tmp_path}/asked'}
    for name, line in scripts.items():
        (commands / name).write_text(f"#!/bin/sh\n{line}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    return run_dir


def end(run_dir: Path, code: int, *flags: str) -> int:
    limits = ["--max-lives", "5", "--max-lives-without-progress", "3", "--signal-s", "60"]
    return job_end.main([str(run_dir), "--code", str(code), *limits, *flags])


def test_killed_ranks_start_again_here_then_elsewhere_until_nothing_moves(
    in_job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (in_job / "checkpoints/step_00000008").mkdir(parents=True)
    lives = [(0, 0, 0, 101), (0, 1, 8, 101), (0, 2, 8, EXIT_RESUME), (1, 0, 8, 137)]
    for token, (restart, attempt, first_step, expected) in enumerate(lives, start=1):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        monkeypatch.setenv("KUROSHIO_ATTEMPT", str(attempt))
        life = {"job": "17", "restart": restart, "attempt": attempt, "first_step": first_step}
        append_line(in_job, {"started": "x", "token": token, **life})
        assert end(in_job, 137) == expected
    assert (in_job.parent / "asked").read_text().splitlines() == ["requeue 17"]
    decisions = [life["decision"] for life in read_lives(in_job)]
    assert decisions == ["restart", "restart", "requeue", "give up"]
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("kuroshio: restart: the ranks were killed by signal 9")
    assert "Life 2 of at most 5 resumes at step 8, in this job" in said[0]
    assert "3 lives in a row committed no checkpoint after step 8" in said[-1]


def test_nodes_that_are_unfit_are_not_tried_again(in_job: Path) -> None:
    assert end(in_job, 1, "--said", "kuroshio: n2: cannot make /tmp/x") == job_end.RESTART_CODE
    assert end(in_job, 1, "--not-started") == EXIT_RESUME


def test_a_stop_that_was_asked_for_during_a_crash_is_kept(in_job: Path) -> None:
    (in_job / "stop").touch()
    assert end(in_job, 137) == 137
    assert read_lives(in_job)[0]["decision"] == "leave"


@pytest.mark.parametrize("code", [100, 101])
def test_a_ranks_own_code_is_no_command_for_the_script(in_job: Path, code: int) -> None:
    life = {"job": "17", "restart": 0, "attempt": 0}
    for number in range(5):  # all lives that it may have
        append_line(in_job, {"started": "x", "token": 1, **life, "restart": number})
    assert end(in_job, code, "--requeue-code", "100", "--state", "RUNNING") == 1


def test_a_script_that_has_no_loop_is_requeued(in_job: Path) -> None:
    """It was submitted before there was one, and runs the checkout's newer code."""
    limits = ["--max-lives", "5", "--max-lives-without-progress", "3"]
    assert job_end.main([str(in_job), "--code", "137", *limits]) == EXIT_RESUME


@pytest.mark.parametrize(("left_s", "code"), [(90, EXIT_RESUME), (180, 101)])
def test_a_job_that_is_nearly_over_starts_no_ranks_again(
    in_job: Path, monkeypatch: pytest.MonkeyPatch, left_s: int, code: int
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + left_s))
    assert end(in_job, 137) == code


def test_what_a_rank_said_counts_more_than_sruns_code(in_job: Path) -> None:
    append_line(in_job, {"started": "x", "token": 1, "job": "17", "restart": 0, "first_step": 0})
    append_line(in_job, {"ended": "y", "token": 1, "exit_code": 76, "reason": "NaN at step 3"})
    assert end(in_job, 143) == 76
    assert not (in_job.parent / "asked").exists()
    [life] = read_lives(in_job)
    assert life["decision"] == "give up" and "NaN at step 3" in life["decision_reason"]


@pytest.mark.faults(row=7)
@pytest.mark.parametrize(("stop", "words"), [("SIGUSR1", "the grace time was too short"), ("", "")])
def test_a_save_that_the_end_of_the_job_cut_off_is_said(
    in_job: Path, stop: str, words: str
) -> None:
    append_line(in_job, {"started": "x", "token": 3, "job": "17", "restart": 0, "first_step": 8})
    for token, step in ((2, 8), (3, 40)):  # an older life's is not this one's
        aside = in_job / f"checkpoints/.step_{step:08d}.life_{token}.tmp"
        aside.mkdir(parents=True)
        note = {"step": step, "stop": stop, "begun": "2026-01-01T10:00:00+00:00"}
        (aside / "begun.json").write_text(json.dumps(note))
    assert end(in_job, 137) == job_end.RESTART_CODE
    reason = read_lives(in_job)[0]["decision_reason"]
    assert "killed by signal 9" in reason
    assert "the save of step 40 was cut off" in reason and "step 8 was" not in reason
    assert words in reason


def test_a_script_whose_job_lives_elsewhere_by_now_does_nothing(
    in_job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Lease.take(in_job, 1, {"job": "17", "restart": 0}, "x")
    assert Lease.take(in_job, 2, {"job": "17", "restart": 1}, "y")
    assert end(in_job, 143) == 73
    assert "belongs to life 2" in capsys.readouterr().out
    assert not (in_job / "lives.jsonl").exists() and not (in_job.parent / "asked").exists()


def test_a_requeue_that_slurm_refuses_is_said(
    in_job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = in_job.parent / "bin/scontrol"
    script.write_text("#!/bin/sh\necho Requested operation is presently disabled >&2\nexit 1\n")
    assert end(in_job, EXIT_RESUME) == EXIT_RESUME
    said = capsys.readouterr().out
    assert said.count("presently disabled") == 3 and "submit the job again" in said


def test_a_controller_that_restarts_is_asked_again(in_job: Path) -> None:
    script, tried = in_job.parent / "bin/scontrol", in_job.parent / "tried"
    lines = f"#!/bin/sh\n[ -e {tried} ] || {{ touch {tried}; echo timed out >&2; exit 1; }}\n"
    script.write_text(f'{lines}echo "$@" >>{in_job.parent}/asked\n')
    assert end(in_job, EXIT_RESUME) == EXIT_RESUME
    assert (in_job.parent / "asked").read_text() == "requeue 17\n"


def test_a_task_of_an_array_is_requeued_alone(
    in_job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its array's number, the own one of the last task, would start all of them again."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    assert end(in_job, EXIT_RESUME) == EXIT_RESUME
    assert (in_job.parent / "asked").read_text() == "requeue 17_4\n"


@pytest.mark.parametrize(("state", "code"), [("RUNNING", 100), ("", 100), ("COMPLETING", 75)])
def test_the_script_of_an_image_asks_slurm_itself(in_job: Path, state: str, code: int) -> None:
    """A job that was cancelled must not come back."""
    (in_job.parent / "bin/squeue").write_text("#!/bin/sh\nexit 127\n")
    assert end(in_job, EXIT_RESUME, "--requeue-code", "100", "--state", state) == code
    assert not (in_job.parent / "asked").exists()


def test_a_full_disk_does_not_hide_why_a_run_ended(
    in_job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **keywords: object) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job_end, "record_end", fail)
    monkeypatch.setattr(job_end, "append_line", fail)
    assert end(in_job, 74) == 74
    said = capsys.readouterr().out
    assert "lacks this end" in said and "give up: srun exited 74" in said


def test_a_rank_that_failed_early_counts_more_than_rank_0_which_was_ended_for_it(
    in_job: Path,
) -> None:
    life = {"job": "17", "restart": 0, "attempt": 0}
    append_line(in_job, {"started": "x", "token": 1, **life, "first_step": 0})
    append_line(in_job, {"ended": "y", "token": None, **life, "exit_code": 1, "reason": "rank 3"})
    append_line(in_job, {"ended": "y", "token": 1, **life, "exit_code": 75, "reason": "a signal"})
    assert end(in_job, 75) == job_end.RESTART_CODE
    first, last = read_lives(in_job)
    assert first["token"] == 1 and "rank 3" in last["decision_reason"]


def test_the_rank_that_failed_counts_more_than_rank_0_which_was_ended_for_it(in_job: Path) -> None:
    life = {"job": "17", "restart": 0}
    append_line(in_job, {"started": "x", "token": 1, **life, "first_step": 0})
    append_line(in_job, {"ended": "y", "token": None, **life, "exit_code": 78, "reason": "rank 3"})
    append_line(in_job, {"ended": "y", "token": 1, **life, "exit_code": 75, "reason": "a signal"})
    assert end(in_job, 143) == 78
    assert not (in_job.parent / "asked").exists()


def test_it_needs_the_standard_library_only() -> None:
    code = "import sys, launch.job_end\n"
    code += "print({m.split('.')[0] for m in sys.modules} - sys.stdlib_module_names)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert set(eval(done.stdout)) == {"launch", "trainer", "tokenizer", "__main__"} - {"tokenizer"}
