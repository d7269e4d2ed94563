"""Which runs a folder stands for: one, those of a pipeline, or all below it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from launch.graph.lineage import is_complete, work_folder
from launch.graph.state import STATE_FILE, StepState, read_state
from launch.monitor.queue import Job
from launch.monitor.row import Row, build_row
from trainer.errors import ConfigError
from trainer.lives import CHECKPOINTS_NAME, LIVES_NAME
from trainer.metrics.history import CONFIG_NAME
from trainer.metrics.journal import JOURNAL_NAME
from trainer.metrics.run_facts import SUBMISSION_NAME, RunFacts, read_run

MAX_DEPTH = 4  # folders below the one given
Jobs = Mapping[str, Job] | None


@dataclass(frozen=True)
class Source:
    """A run's folder, or a step of a pipeline that may not have one yet."""

    folder: Path
    name: str = ""  # instead of the folder's own
    step: StepState | None = None
    facts: RunFacts | None = None  # None: no run is there yet
    is_complete: bool = False  # a step whose result is there
    job_folder: Path | None = None  # of a step's job, if it is another one


def find_sources(path: Path) -> list[Source]:
    """Return what to watch in ``path``.

    Raises:
        ConfigError: when there is no such folder or no run in it.
        CheckpointError: when a pipeline's file is damaged.
    """
    if not path.is_dir():
        raise ConfigError(
            f"{path} is no folder; give a run's, a pipeline's, or one that holds runs"
        )
    if (path / STATE_FILE).is_file():
        return read_steps(path)
    if is_run(path):
        return [Source(path, facts=read_run(path))]
    found = list(_walk(path, path, MAX_DEPTH))
    if not found:
        raise ConfigError(
            f"no run in {path} or below: a run's folder holds {CONFIG_NAME} or {JOURNAL_NAME}; "
            "give the folder that your runs are in"
        )
    return found


def read_steps(folder: Path) -> list[Source]:
    """Return the steps of a pipeline in its own order.

    Raises:
        CheckpointError: when its file is damaged.
    """
    state = read_state(folder)
    return [
        Source(
            place := Path(step.folder),
            name,
            step,
            facts=read_run(place) if is_run(place) else None,
            is_complete=is_complete(folder, name),
            job_folder=None if step.kind == "run" else work_folder(folder, name),
        )
        for name, step in (state.steps.items() if state else ())
    ]


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run's: anything else may hold a config.yaml, too."""
    if (folder / JOURNAL_NAME).is_file():
        return True
    others = (LIVES_NAME, SUBMISSION_NAME, CHECKPOINTS_NAME)
    return (folder / CONFIG_NAME).is_file() and any((folder / name).exists() for name in others)


def build_rows(sources: list[Source], jobs: Jobs) -> list[Row]:
    """Return what is shown of every source."""
    rows: list[Row] = []
    for source in sources:
        broken = {row.name for row in rows if row.state in ("failed", "held", "lost")}
        rows.append(_build(source, jobs, broken))
    return rows


def job_ids(sources: list[Source]) -> list[str]:
    """Return the Slurm jobs of all sources; without any, nobody needs to ask Slurm."""
    jobs = [source.step.job for source in sources if source.step and source.step.job]
    return jobs + [job for source in sources if source.facts for job in source.facts.job_ids]


def _walk(top: Path, folder: Path, depth: int) -> Iterator[Source]:
    """Yield the runs and pipelines below a folder, named by their paths from ``top``."""
    for child in _subfolders(folder):
        name = str(child.relative_to(top))
        if (child / STATE_FILE).is_file():
            steps = read_steps(child)
            yield from (replace(step, name=f"{name}/{step.name}") for step in steps)
        elif is_run(child):
            yield Source(child, name, facts=read_run(child))
        elif depth > 1:
            yield from _walk(top, child, depth - 1)


def _subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder; those of other users beside ours are passed over."""
    with os.scandir(folder) as entries:
        folders = [e for e in entries if e.is_dir(follow_symlinks=False)]
    names = sorted(e.name for e in folders if not e.name.startswith("."))
    return [folder / name for name in names if _is_open(folder / name)]


def _is_open(folder: Path) -> bool:
    return os.access(folder, os.R_OK | os.X_OK, effective_ids=True)


def _build(source: Source, jobs: Jobs, broken: set[str]) -> Row:
    """Return the row of a source; ``broken`` are the names of rows that hold up their children."""
    step, facts = source.step, source.facts
    if step is None:
        assert facts is not None  # no step: the source is a run
        return build_row(facts, jobs, source.name)
    if facts is not None and not source.is_complete and step.job:
        known = [*(facts.submission.get("job_ids") or []), step.job]
        facts = replace(facts, submission={**facts.submission, "job_ids": known})
    if facts is not None:
        row = build_row(facts, jobs, source.name)
    else:
        row = Row(name=source.name, folder=source.folder, stage=step.stage or step.kind)
    row = replace(row, parents=step.parents, job=row.job or step.job)
    if facts is None or row.state in ("new", "submitted") or not facts.lives:
        word, note = judge_step(source, jobs, broken)
        return replace(row, state=word, note=note or row.note)
    return row


def judge_step(source: Source, jobs: Jobs, broken: set[str]) -> tuple[str, str]:
    """Return the state of a step that has not lived yet, or never writes lives, and why."""
    step = source.step
    assert step is not None
    if source.is_complete or step.state == "done":
        return "finished", ""
    job = (jobs or {}).get(step.job or "")
    if job is not None and job.is_held:
        return "held", job.reason
    if job is not None and (job.is_pending or job.is_active):
        reason = job.reason if job.is_pending and job.reason != "None" else ""
        return ("pending" if job.is_pending else "running"), reason
    prefix = source.name.removesuffix(source.name.rpartition("/")[2])
    blame = [parent for parent in step.parents if prefix + parent in broken]
    if blame:
        return "held", f"{', '.join(blame)} did not finish"
    if job is not None or (jobs is not None and step.state == "submitted"):
        how = job.state if job else "not known to Slurm any more"
        return (
            "failed",
            f"job {step.job} is {how}; see `kuroshio logs {source.job_folder or source.folder}`",
        )
    return step.state, step.reason or ""
