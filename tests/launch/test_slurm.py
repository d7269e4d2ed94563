"""Ranks under a real Slurm: one node on this machine, daemons of our own in a temporary folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launch.help import CONF
from launch.rendezvous import free_port
from trainer.errors import EXIT_RESUME

ROOT = Path(__file__).resolve().parents[2]
PROBE = Path(__file__).resolve().parent / "probe"
DAEMONS = ("munged", "slurmctld", "slurmd")
NEEDS = "apt-get install slurmctld slurmd slurm-client munge"
TIMEOUT_S = 300
CONFIG = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=5
NodeName={host} CPUs=4 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=10 State=UP
"""

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start a one-node cluster; give the environment its commands need."""
    missing = [name for name in DAEMONS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and {', '.join(missing or DAEMONS)}: {NEEDS}")
    folder = tmp_path_factory.mktemp("slurm")
    pids = [start_munge(folder)]
    environ = {**os.environ, "SLURM_CONF": str(write_config(folder))}
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    try:
        for daemon in ("slurmctld", "slurmd"):
            run_quietly([daemon, "-f", environ["SLURM_CONF"]], environ)
            pids.append(read_pid(folder / f"{daemon}.pid"))
        wait_until_idle(environ)
        yield environ
    finally:
        for pid in reversed(pids):
            end_process(pid)


def start_munge(folder: Path) -> int:
    """Start an authentication daemon with a key of its own; return its process."""
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    command = ["munged", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}",
               f"--log-file={folder}/munged.log", f"--pid-file={folder}/munged.pid",
               f"--seed-file={folder}/munge.seed", "--num-threads=2"]  # fmt: skip
    run_quietly(command, dict(os.environ))
    return read_pid(folder / "munged.pid")


def write_config(folder: Path) -> Path:
    path = folder / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    ports = {"controller_port": free_port(), "node_port": free_port()}
    path.write_text(CONFIG.format(host=host, folder=folder, **ports), encoding="utf-8")
    return path


def run_quietly(command: list[str], environ: dict[str, str]) -> None:
    # A daemon that inherited a pipe would keep its reader waiting.
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command, env=environ, check=True, timeout=30, **quiet)  # type: ignore


def read_pid(path: Path) -> int:
    deadline = time.monotonic() + 20
    while not path.exists() or not path.read_text().strip():
        assert time.monotonic() < deadline, f"{path} never appeared"
        time.sleep(0.05)
    return int(path.read_text())


def wait_until_idle(environ: dict[str, str]) -> None:
    deadline = time.monotonic() + 30
    state = ""
    while "idle" not in state:
        assert time.monotonic() < deadline, f"the node never became idle: {state}"
        time.sleep(0.2)
        command = ["sinfo", "-h", "-o", "%T"]
        state = subprocess.run(command, env=environ, capture_output=True, text=True).stdout


def end_process(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.05)


def srun(environ: dict[str, str], run_dir: Path, *more: str) -> subprocess.Popen[str]:
    """Start two tasks of a probe run."""
    text = (CONF / "stage" / "pretrain.yaml").read_text(encoding="utf-8")
    fields = [f"~stage.{key}" for key in yaml.safe_load(text)["stage"] if key != "name"]
    words = ["stage.name=probe", *fields, f"run_dir={run_dir}", "cluster.gpus_per_node=2", *more]
    own = {"PYTHONPATH": f"{PROBE}:{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        ["srun", "--ntasks=2", "--kill-on-bad-exit=1", "--label",
         sys.executable, "-m", "launch", "run", *words],
        env={**environ, **own}, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_tasks_of_a_step_are_the_ranks(slurm: dict[str, str], tmp_path: Path) -> None:
    process = srun(slurm, tmp_path)
    output = process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == 0, output
    for rank in (0, 1):
        place = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert (place["rank"], place["world_size"], place["total"]) == (rank, 2, 1.0)
        assert place["MASTER_ADDR"] == socket.gethostname().partition(".")[0]
        assert not place["mpi4py"]
    life = json.loads((tmp_path / "lives.jsonl").read_text())
    assert (life["launcher"], life["world_size"]) == ("slurm", 2) and life["job"]


def test_a_failing_rank_ends_the_step(slurm: dict[str, str], tmp_path: Path) -> None:
    process = srun(slurm, tmp_path, "+stage.action=fail")
    output = process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == 76, output
    assert "1: kuroshio: loss is NaN at step 3" in output


def test_usr1_reaches_the_ranks_which_save(slurm: dict[str, str], tmp_path: Path) -> None:
    process = srun(slurm, tmp_path, "+stage.action=wait")
    deadline = time.monotonic() + TIMEOUT_S
    while len(list(tmp_path.glob("ready*"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    job = json.loads((tmp_path / "lives.jsonl").read_text())["job"]
    subprocess.run(["scancel", "--signal=USR1", f"{job}.0"], env=slurm, check=True)
    output = process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == EXIT_RESUME, output
    for rank in (0, 1):
        assert (tmp_path / f"saved{rank}").read_text() == str([int(signal.SIGUSR1)])
