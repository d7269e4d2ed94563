"""``kuroshio stop``: let a run save and stop, and take a waiting job out of the queue."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch import sbatch
from launch.monitor.queue import Job, Queue
from launch.monitor.sources import Source, find_sources, is_run, job_ids
from launch.monitor.state import judge
from launch.slurm_queue import LIVING, job_state
from trainer.errors import ConfigError, StorageError
from trainer.lives import STOP_NAME
from trainer.metrics.console import show_duration
from trainer.metrics.run_facts import RunFacts, figure
from trainer.stages import SINGLE_PROCESS


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
    facts, numbers = source.facts, _numbers(source)
    waited = cancel_waiting(numbers, jobs)
    started = [number for number in waited if job_state(number) in LIVING]
    if started and facts is None:
        return f"job {', '.join(started)} has begun just now; end it with scancel"
    if waited and not started:
        return f"job {', '.join(waited)} waited and is cancelled; nothing was running"
    state = judge(facts, jobs) if facts else None
    if facts is None or state is None or not (state.is_alive or started):
        word = f"{state.word}: " if state else ""
        is_done = source.is_complete or (facts is not None and facts.is_finished)
        if jobs is None and numbers and not is_done:
            return f"{word}whether job {numbers[-1]} waits is unknown; try again"
        return f"{word}nothing runs"
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


def cancel_waiting(numbers: Sequence[str], jobs: Mapping[str, Job] | None) -> list[str]:
    """Cancel those of the jobs that wait, and return them; one may have begun by then.

    Args:
        numbers: of a run's jobs.
        jobs: what Slurm says.

    Raises:
        ConfigError: when Slurm refuses.
    """
    waiting = [number for number in numbers if jobs and number in jobs and jobs[number].is_pending]
    # Only while it waits: one that starts this moment saves first.
    if problem := sbatch.cancel(waiting, "--state=PENDING"):
        raise ConfigError(problem)
    return list(dict.fromkeys(waiting))


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
