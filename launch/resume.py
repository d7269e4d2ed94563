"""``kuroshio resume``: start a run again where its newest checkpoint is."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import ROOT, sbatch
from launch.file_modes import private_files, wants_sharing
from launch.job_folder import SCRIPT, forget_stop, record_again
from launch.monitor.queue import Queue
from launch.monitor.state import State, judge, newest_job
from trainer.errors import ConfigError
from trainer.metrics.history import CONFIG_NAME
from trainer.metrics.run_facts import RunFacts, read_run

GOING = ("running", "stopping", "pending", "requeued", "held")


def main(argv: Sequence[str]) -> int:
    """Submit the run's job again, or run a local run here; return the exit code.

    Raises:
        ConfigError: when the run lives, waits, or its job cannot be submitted.
    """
    parser = argparse.ArgumentParser(
        prog="kuroshio resume",
        allow_abbrev=False,
        description="Go on with a run that stopped, failed or was lost, from its newest "
        "checkpoint: a submitted one as a new job, another one here.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder (run_dir)")
    run_dir = parser.parse_args(argv).run
    facts = read_run(run_dir)
    queue = Queue(is_on=bool(facts.job_ids))
    state = judge(facts, queue.jobs())
    refuse_living(facts, state, queue)
    if state.word == "finished":
        print(f"{run_dir} is finished at step {facts.step}: nothing to do")
        return 0
    directory = find_directory(facts)
    run_dir = run_dir.absolute()
    os.chdir(directory)
    forget_stop(run_dir)
    if (run_dir / SCRIPT).is_file():
        return submit_again(facts, run_dir)
    if facts.job_ids and facts.submission:  # a task of a sweep, whose script is for all of them
        raise ConfigError(
            f"{run_dir} was submitted as one of several (job {facts.job_ids[-1]}), so it has no "
            f"script of its own; `kuroshio submit --config {run_dir / CONFIG_NAME}` goes on"
        )
    return run_here(run_dir)


def refuse_living(facts: RunFacts, state: State, queue: Queue) -> None:
    """Raise ConfigError when the run lives or waits, naming job and host."""
    if queue.problem:
        raise ConfigError(
            f"{queue.problem}; whether job {facts.job_ids[-1]} of {facts.run_dir} lives is "
            "unknown, so nothing is started; try again when Slurm answers"
        )
    if state.word not in GOING:
        return
    job = newest_job(facts, queue.jobs())
    who = f"job {job.number}" if job else "a process"
    where = job.nodes if job else facts.lives[-1].host if facts.lives else ""
    raise ConfigError(
        f"{facts.run_dir} is {state.word}: {who}{f' on {where}' if where else ''} has it; see "
        f"`kuroshio watch {facts.run_dir}`, or end it with `kuroshio stop {facts.run_dir}` first"
    )


def find_directory(facts: RunFacts) -> Path:
    """Return the directory that the run was started in: relative paths of its config mean that.

    Raises:
        ConfigError: when it is gone.
    """
    known = [life.directory for life in facts.lives if life.directory]
    name = str(facts.submission.get("directory") or (known[-1] if known else "."))
    if not Path(name).is_dir():
        raise ConfigError(
            f"{facts.run_dir} was started in {name}, which does not exist (any more): relative "
            "paths of its config are seen from there; bring it back, or go to where the data is "
            f"and use `kuroshio run --config` or `kuroshio submit --config` with its {CONFIG_NAME}"
        )
    return Path(name)


def submit_again(facts: RunFacts, run_dir: Path) -> int:
    """Submit the script that the run was submitted with, and note the new job in the folder.

    Raises:
        ConfigError: when there is no Slurm here, or it refuses.
        StorageError: when the folder cannot be written.
    """
    sbatch.require_slurm(str(facts.submission.get("cluster") or "slurm"))
    refuse_moved(run_dir)
    # A run that has lived had all that it waited for; those jobs may have been made anew since.
    has_lived = any(life.started for life in facts.lives)
    flags = ["--dependency="] if has_lived else []
    with private_files(wants_sharing(facts.config)), sbatch.all_or_none() as jobs:
        jobs.append(sbatch.submit_script(run_dir / SCRIPT, *flags))
        record_again(run_dir, jobs[0])
    step = facts.saved.step if facts.saved else 0
    print(
        f"job {jobs[0]} resumes {run_dir} at step {step}; follow it with `kuroshio watch {run_dir}`"
    )
    return 0


def refuse_moved(run_dir: Path) -> None:
    """Raise ConfigError when the script of a run is of another folder than the one it lies in."""
    text = (run_dir / SCRIPT).read_text(encoding="utf-8")
    found = re.search(r"^RUN=(/.*)$", text, re.MULTILINE)
    if found and Path(found[1]).resolve() != run_dir.resolve():
        raise ConfigError(
            f"{run_dir} was {found[1]} when it was submitted, and its {SCRIPT} still says so; "
            f"`kuroshio submit --config {run_dir / CONFIG_NAME}` goes on"
        )


def run_here(run_dir: Path) -> int:
    """Become ``kuroshio run`` of the frozen config."""
    config = run_dir / CONFIG_NAME
    if not config.is_file():
        raise ConfigError(f"{run_dir} has no {CONFIG_NAME}, so nobody can tell what to resume")
    sys.stdout.flush()
    # This process imports nothing heavy; the run takes its place, with its signals and exit code.
    words = [sys.executable, "-m", "launch", "run", "--config", str(config)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # we may have moved away
    os.execve(sys.executable, words, {**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
