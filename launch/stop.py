"""``kuroshio stop``: let a run save and stop, and take a waiting job out of the queue."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launch.monitor.queue import Job, Queue
from launch.monitor.sources import Source, find_sources, is_run, job_ids
from launch.monitor.state import judge
from trainer.errors import ConfigError, StorageError
from trainer.metrics.console import show_duration
from trainer.metrics.run_facts import STOP_NAME, RunFacts, figure
from trainer.stages import SINGLE_PROCESS

TIMEOUT_S = 30.0


def main(argv: Sequence[str]) -> int:
    """Ask every run of a folder to stop, the last of a pipeline first, and say what will happen.

    Raises:
        ConfigError: when the folder is no run's or pipeline's, or Slurm refuses.
        StorageError: when the request cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="kuroshio stop",
        allow_abbrev=False,
        description="Save and stop: a running run finishes its step, saves and leaves; a job that "
        "waits is cancelled. `kuroshio resume RUN` goes on.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run or a pipeline")
    sources = _sources(parser.parse_args(argv).run)
    queue = Queue()
    jobs = queue.jobs() if job_ids(sources) else None
    if queue.problem:
        print(f"{queue.problem}; judging by the files alone")
    for source in reversed(sources):  # children first: none may start while its parent ends
        print(f"{source.folder}: {stop(source, jobs)}")
    return 0


def stop(source: Source, jobs: Mapping[str, Job] | None) -> str:
    """Stop a run, or a step of a pipeline, and return what that means."""
    cancelled = cancel_waiting(_numbers(source), jobs)
    facts = source.facts
    if facts is None:
        return cancelled or "nothing runs"
    state = judge(facts, jobs)
    if not state.is_alive:
        return cancelled or f"{state.word}: nothing runs"
    if facts.stage in SINGLE_PROCESS:
        last = facts.lives[-1] if facts.lives else None
        how = f"scancel {last.job}" if last and last.job else "Ctrl-C where it runs"
        return f"stage {facts.stage} has no steps to stop between; end it with {how}"
    return request_stop(facts)


def request_stop(facts: RunFacts) -> str:
    """Leave the request in the run's folder; return what will happen.

    Raises:
        StorageError: when it cannot be written.
    """
    try:
        (facts.run_dir / STOP_NAME).touch()
    except OSError as error:
        raise StorageError(
            f"{facts.run_dir / STOP_NAME} cannot be written: {error.strerror}; send SIGTERM to the "
            "run instead"
        ) from error
    seconds = figure(facts.train, "seconds")
    when = f" (about {show_duration(seconds)} a step)" if seconds and seconds >= 1 else ""
    at = f" {facts.step}" if facts.step is not None else ""
    return (
        f"after the step that follows{at or ' the present one'}{when} all ranks save and leave"
        f"{'; the job is not requeued' if facts.job_ids else ''}. "
        f"`kuroshio resume {facts.run_dir}` goes on"
    )


def cancel_waiting(
    numbers: Sequence[str],
    jobs: Mapping[str, Job] | None,
    call: Callable[[Sequence[str]], str] | None = None,
) -> str:
    """Cancel those of the jobs that wait; return what was done, empty for nothing.

    Args:
        numbers: of a run's jobs.
        jobs: what Slurm says.
        call: runs a command and returns what it complains of.
    """
    waiting = [number for number in numbers if jobs and number in jobs and jobs[number].is_pending]
    if not waiting:
        return ""
    # Only while it waits: one that starts this moment saves first.
    problem = (call or _call)(["scancel", "--state=PENDING", *waiting])
    if problem:
        raise ConfigError(f"scancel {' '.join(waiting)} failed: {problem}")
    return f"job {', '.join(waiting)} waited and is cancelled; nothing was running"


def _sources(folder: Path) -> list[Source]:
    sources = find_sources(folder)
    if not is_run(folder) and not any(source.step for source in sources):
        raise ConfigError(
            f"{folder} is no run's and no pipeline's folder; stop one of those below it: "
            + ", ".join(str(source.folder) for source in sources[:5])
        )
    return sources


def _numbers(source: Source) -> list[str]:
    own = [source.step.job] if source.step and source.step.job else []
    return own + (source.facts.job_ids if source.facts else [])


def _call(command: Sequence[str]) -> str:
    """Run a command; return its complaint, empty when it has none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""
