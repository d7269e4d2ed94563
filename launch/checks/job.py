"""A check on several ranks: as a job of Slurm, or as processes of this machine."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from launch import sbatch
from launch.checks import verdict
from launch.checks.finding import Finding, error
from launch.checks.rank_plan import CheckPlan, read_plan
from launch.checks.report import MAX_PROBLEM_CHARS, read_lines
from launch.checks.verdict import Reports
from launch.file_modes import private_files
from launch.job_folder import write_job
from launch.local import threads_per_rank
from launch.rendezvous import free_port
from launch.run_folder import writing
from launch.slurm import job_of
from launch.slurm_queue import ask_squeue, job_state
from trainer.config import ClusterConfig, RunConfig
from trainer.config.cluster import check_submission
from trainer.errors import ConfigError

PLAN, HOSTS, NODES, FIRST_NODE = "plan.json", "hosts", "nodes", "first_node"
COMMAND = ("doctor", "--ranks")
TIME_LIMIT = "00:30:00"  # of the job: a minute or two, and a cold start of Python on many nodes
MEASURING_S = 60.0  # a rank may say nothing for that long although all is well
POLL_S, LONGEST_POLL_S = 4.0, 60.0  # each look is a request to Slurm's controller
LOCAL_POLL_S = 0.5
COMPLAINT = re.compile(r"srun: error: |kuroshio: |[\w.]+(Error|Exception): ")


def plan_check(config: RunConfig, folder: Path, wait_s: float) -> CheckPlan:
    """Return what the ranks of a check look at for the run of ``config``."""
    cluster = config.cluster
    site, store = cluster.site, Path(config.data.store_dir).expanduser().absolute()
    folders = {"token stores": str(store)} if store.is_dir() else {}
    if site.local_scratch is not None:
        folders["node-local scratch"] = site.local_scratch
    speed = site.inter_node_gb_per_s
    return CheckPlan(
        ranks_per_node=cluster.gpus_per_node,
        folder=str(folder),
        folders=folders,
        interface=site.interface,
        expects_gpu=bool(site.gpus_per_node),
        wait_s=wait_s,
        profile_gb_per_s=speed * cluster.gpus_per_node if speed else None,
    )


def name_folder(config: RunConfig) -> Path:
    """Return a new folder beside the run's, on the same file system."""
    beside = Path(config.run_dir).expanduser().absolute().parent
    return beside / time.strftime("doctor-%Y%m%d-%H%M%S")


def run_here(plan: CheckPlan) -> None:
    """Start the ranks on this machine and wait for them."""
    folder, host = Path(plan.folder), socket.gethostname()
    with private_files(), writing(folder):
        (folder / NODES).mkdir(parents=True)
        (folder / PLAN).write_text(plan.write(), encoding="utf-8")
        (folder / HOSTS).write_text(f"{host}\n", encoding="utf-8")
    environ = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(plan.ranks_per_node)))
    ranks = []
    for local_rank in range(plan.ranks_per_node):
        base = folder / NODES / f"{host}.{local_rank}"
        with (
            (folder / PLAN).open() as told,
            base.with_name(f"{base.name}.out").open("w") as out,
            base.with_name(f"{base.name}.err").open("w") as err,
        ):
            command = [sys.executable, "-m", "launch", *COMMAND, host]
            own = {**environ, "LOCAL_RANK": str(local_rank)}
            ranks.append(subprocess.Popen(command, env=own, stdin=told, stdout=out, stderr=err))
    try:
        wait_for_progress(
            folder, plan, lambda: any(rank.poll() is None for rank in ranks), LOCAL_POLL_S
        )
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def submit(plan: CheckPlan, cluster: ClusterConfig) -> str:
    """Write the folder of a check and submit its job; return the job's number.

    Raises:
        ConfigError: a value that has no place in a job script, or a refusal of Slurm.
        StorageError: the folder cannot be written.
    """
    with private_files():
        return sbatch.submit_script(_write(plan, cluster))


def run_in_job(plan: CheckPlan, cluster: ClusterConfig) -> None:
    """Run the script of a check in the allocation that this process is in."""
    with private_files():
        script = _write(plan, cluster)
    command = ["bash", str(script)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        wait_for_progress(Path(plan.folder), plan, lambda: process.poll() is None, LOCAL_POLL_S)
    finally:
        process.terminate()
        process.wait()


def _write(plan: CheckPlan, cluster: ClusterConfig) -> Path:
    if problems := check_submission(cluster):
        raise ConfigError("\n".join(problems))
    sbatch.require_slurm(cluster.site.name)
    job = job_of(cluster, "kuroshio-doctor", plan.folder, f"{plan.folder}/code")
    job = replace(job, command=COMMAND, each_node=True, requeue=False)
    script = write_job(replace(job, time=cluster.time or TIME_LIMIT))
    (Path(plan.folder) / PLAN).write_text(plan.write(), encoding="utf-8")
    return script


def wait(number: str, plan: CheckPlan, say: Callable[[str], None]) -> None:
    """Wait until the job ends, or until its ranks have been silent for too long; then end it."""
    folder, told, pause_s = Path(plan.folder), "", POLL_S
    while (state := job_state(number)) in ("PENDING", "CONFIGURING", None):
        text = "Slurm does not answer; asking on"
        if state:
            text = f"job {number} is {state}: {ask_squeue(number, '%r')}"
        if text != told:
            say(text)
            told = text
        time.sleep(pause_s)
        pause_s = min(LONGEST_POLL_S, 1.5 * pause_s)
    (folder / FIRST_NODE).write_text(ask_squeue(number, "%B") or "", encoding="utf-8")
    wait_for_progress(folder, plan, lambda: job_state(number) not in ("", "COMPLETING"), POLL_S)
    if problem := sbatch.cancel([number], "--quiet"):
        say(problem)


def wait_for_progress(
    folder: Path, plan: CheckPlan, is_running: Callable[[], bool], poll_s: float
) -> None:
    """Return when the ranks are done, or when nothing new came for too long."""
    last, since = -1, time.monotonic()
    while is_running() and time.monotonic() - since < plan.wait_s + MEASURING_S:
        time.sleep(poll_s)
        size = sum(path.stat().st_size for path in _outputs(folder))
        if size != last:
            last, since = size, time.monotonic()


def _outputs(folder: Path) -> list[Path]:
    return sorted((folder / NODES).glob("*.out"))


def read(folder: Path) -> list[Finding]:
    """Judge what the ranks of a check said, also while it runs, and after its job was killed.

    Raises:
        ConfigError: the folder is not that of a check.
    """
    try:
        plan = read_plan((folder / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as failure:
        raise ConfigError(
            f"--read {folder}: no readable {PLAN} in it ({failure}); give the folder that "
            "`kuroshio doctor --nodes` named"
        ) from failure
    if not (folder / HOSTS).is_file():
        return [_explain_absence(folder)]
    nodes = tuple((folder / HOSTS).read_text(encoding="utf-8").split())
    return verdict.judge(
        Reports(
            nodes=nodes,
            ranks_per_node=plan.ranks_per_node,
            ranks=read_lines(line for path in _outputs(folder) for line in _lines(path)),
            wait_s=plan.wait_s,
            profile_gb_per_s=plan.profile_gb_per_s,
            expects_gpu=plan.expects_gpu,
            complaints={node: _complaint(folder / NODES / f"{node}.err") for node in nodes},
        )
    )


def _explain_absence(folder: Path) -> Finding:
    """Say why the job's script, which names the nodes first of all, did not come as far."""
    remedy = f"see the files in {folder}/logs, and `squeue -u $USER`"
    path = folder / FIRST_NODE
    node = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    if not node:
        return error("ranks", "the job never began", "it waits, or was cancelled", remedy)
    what = f"{node}: it should have run the job's script, and did not"
    return Finding("ranks", "error", what, "the node is down or cut off", remedy, (node,))


def _complaint(path: Path) -> str:
    """Return the line in which srun, Kuroshio or Python says what went wrong, if one does."""
    found = [line for line in _lines(path) if COMPLAINT.match(line)] if path.is_file() else []
    first = [line for line in found if line.startswith("srun")]  # what follows comes of it
    return (first[:1] or found[-1:] or [""])[0][:MAX_PROBLEM_CHARS]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()
