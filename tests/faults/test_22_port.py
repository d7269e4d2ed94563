"""Row 22: another process listens where the ranks were to meet."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from cluster_runs import Runs
from probe_runs import ROOT, RUN, TIMEOUT_S, environment, rank_variables, words

from launch import local, rendezvous
from trainer.errors import PortTakenError
from trainer.lives import newest_step, read_lives

LISTEN = """
import selectors, socket, sys

asked = selectors.DefaultSelector()
for port in map(int, sys.argv[1:]):
    asked.register(socket.create_server(("", port), backlog=64), selectors.EVENT_READ)
asked.register(sys.stdin, selectors.EVENT_READ)
print("listening", flush=True)
while True:
    for key, _ in asked.select():
        if key.fileobj is sys.stdin:  # closed
            sys.exit()
        key.fileobj.accept()
        print("found", flush=True)
"""


@pytest.mark.faults(row=22)
@pytest.mark.slow
def test_local_ranks_meet_at_another_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for key, value in environment().items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(ROOT)
    with socket.create_server(("", 0)) as listener:
        taken = listener.getsockname()[1]
        ports = iter([taken, rendezvous.free_port()])
        monkeypatch.setattr(local, "free_port", lambda: next(ports))
        command = [*RUN, *words(tmp_path / "run")]
        assert local.run_ranks(command, 2, "") == 0
    said = capfd.readouterr().err
    assert f"MASTER_PORT={taken} is taken by another process on {socket.gethostname()}" in said
    assert f"rank 0 exited {PortTakenError.exit_code}" in said and "another port" in said
    first, second = read_lives(tmp_path / "run")
    assert (first["exit_code"], second["exit_code"]) == (PortTakenError.exit_code, 0)
    assert (tmp_path / "run" / "rank1.json").is_file()


@pytest.mark.faults(row=22)
def test_a_port_that_the_user_chose_is_named(tmp_path: Path) -> None:
    variables = rank_variables()
    with socket.create_server(("", 0)) as listener:
        taken = str(listener.getsockname()[1])
        own = environment(**variables[0] | {"MASTER_PORT": taken})
        command = [*RUN, *words(tmp_path / "run")]
        done = subprocess.run(
            command, env=own, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    assert done.returncode == PortTakenError.exit_code, done.stderr
    assert f"kuroshio: MASTER_PORT={taken} is taken by another process" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.faults(row=22)
@pytest.mark.slurm
@pytest.mark.slow
def test_a_job_takes_the_next_port(runs: Runs, cluster: Cluster, tmp_path: Path) -> None:
    before = cluster.submit(
        "#!/bin/bash\n", "--account=MST109001", "--gres=gpu:1", "--output=/dev/null"
    )
    next_jobs = range(int(before) + 1, int(before) + 5)  # checks of a submission take numbers too
    taken = [str(20000 + job % 10000) for job in next_jobs]
    command = [sys.executable, "-u", "-c", LISTEN, *taken]
    nodes = [machine.inside(*command) for n, machine in cluster.machines.items() if n != "switch"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    listeners = [subprocess.Popen(node, **pipes) for node in nodes or [command]]
    try:
        assert all(p.stdout and p.stdout.readline() == "listening\n" for p in listeners)
        run_dir = tmp_path / "run"
        values = runs.values(run_dir)
        values["loop"] |= {"max_steps": 2}
        job = runs.submit(values)
        assert int(job) in next_jobs
        cluster.wait(job, "COMPLETED")
        assert newest_step(run_dir) == 2 and cluster.show(job)["Restarts"] == "0"
    finally:
        said = [process.communicate("")[0] for process in listeners]  # which closes their input
    assert any("found" in words for words in said)
