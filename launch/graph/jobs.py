"""``kuroshio submit pipeline=NAME``: every step a job that waits for its parents' jobs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from launch import sbatch
from launch.file_modes import private_files, wants_sharing
from launch.graph import lineage, progress
from launch.graph.check import Values, check_sources, compose_runs
from launch.graph.definition import Pipeline, Step, read_pipeline
from launch.graph.state import PipelineState, StepState, read_state, read_states, write_state
from launch.slurm_queue import job_state
from launch.submission import Draft, draft, submit_command, submit_draft
from trainer.config import ClusterConfig, load_config
from trainer.errors import ConfigError
from trainer.lives import utc_now

ANY_PARENT = ("1",)  # while drafting: the run has parents whose models nobody can read yet
ALIVE = ("submitted", "running")
FLAGS = ("--dry-run", "--force")


def main(words: Sequence[str]) -> int:
    """Submit a pipeline's graph; jobs that wait or run, and finished steps, are left alone.

    Args:
        words: as of ``launch.pipeline.main``, with ``cluster=NAME``; with ``--dry-run`` everything
            is checked and shown, nothing submitted or written; with ``--force`` a run is submitted
            although its plan says that it cannot be.

    Raises:
        ConfigError: whatever can be known to be wrong before the first job.
    """
    pipeline = read_pipeline([word for word in words if word not in FLAGS], absolute=True)
    composed = compose_runs(pipeline)
    progress.refuse_changes(pipeline, composed)
    check_sources(pipeline, composed)
    states = read_states(pipeline.folder) if read_state(pipeline.folder) else {}
    todo = _to_submit(pipeline, states)
    drafts = _drafts(pipeline, composed, todo, must_fit="--force" not in words)
    if "--dry-run" in words:
        _foresee(pipeline, todo, drafts)
        return 0
    cluster = load_config(next(iter(composed.values()))).cluster.site.name
    table = progress.new_state(pipeline, composed, "submit", cluster)
    for name, state in states.items():
        if name in table.steps and name not in todo:
            table = table.changed(name, state=state.state, job=state.job)
    shared = any(map(wants_sharing, composed.values()))
    with private_files(shared), sbatch.all_or_none() as submitted:
        for name in todo:
            _drop(states.get(name))
            job = _submit(pipeline, pipeline.steps[name], composed, drafts, table)
            submitted.append(job)
            values = {"state": "submitted", "job": job, "started": utc_now(), "ended": None}
            table = table.changed(name, **values, exit_code=None, reason=None)
            write_state(pipeline.folder, table)
    _show(pipeline, table)
    return 0


def _to_submit(pipeline: Pipeline, states: Mapping[str, StepState]) -> list[str]:
    """Return the steps that need a job, parents first.

    Raises:
        ConfigError: a step was made from other inputs than its parents hold now.
    """
    todo: list[str] = []
    for name, step in pipeline.steps.items():
        if name in states and states[name].state in ALIVE:
            continue
        settled = all(lineage.is_complete(pipeline.folder, parent) for parent in step.parents)
        if set(step.parents) & {*todo} or not settled or not progress.is_done(pipeline, step):
            todo.append(name)
    return todo


def _drafts(
    pipeline: Pipeline, composed: Mapping[str, Values], todo: Sequence[str], must_fit: bool
) -> dict[str, Draft]:
    """Check every run that is to be submitted, before the first of them is.

    Raises:
        ConfigError: with the problems of all.
    """
    drafts, problems = {}, []
    for name in todo:
        step = pipeline.steps[name]
        if step.kind != "run":
            continue
        try:
            parents = ANY_PARENT if step.parents else ()
            drafts[name] = draft(composed[name], step.folder, parents, must_fit)
        except ConfigError as error:
            problems += [f"step {name}: {line}" for line in str(error).splitlines()]
    if problems:
        raise ConfigError("\n".join(problems))
    return drafts


def _submit(
    pipeline: Pipeline,
    step: Step,
    composed: Mapping[str, Values],
    drafts: Mapping[str, Draft],
    table: PipelineState,
) -> str:
    """Submit one step behind those of its parents that have jobs; return its job."""
    progress.record_step(pipeline, step, composed)
    jobs = [str(table.steps[p].job) for p in step.parents if table.steps[p].state in ALIVE]
    if step.name in drafts:
        checked = drafts[step.name]
        job = dataclasses.replace(checked.job, parents=tuple(jobs))
        return submit_draft(dataclasses.replace(checked, job=job))[0]
    words = ["run", "--step", str(pipeline.folder), step.name]
    place = lineage.work_folder(pipeline.folder, step.name)
    cluster = _cluster(pipeline, step, composed)
    return submit_command(words, place, cluster, jobs, f"{pipeline.name}-{step.name}")


def _cluster(pipeline: Pipeline, step: Step, composed: Mapping[str, Values]) -> ClusterConfig:
    """Return where a step that is no run has its job: where its parent, or its child, has one."""
    kin = [*step.parents, *pipeline.descendants(step.name)]
    return load_config(next(composed[name] for name in kin if name in composed)).cluster


def _foresee(pipeline: Pipeline, todo: Sequence[str], drafts: Mapping[str, Draft]) -> None:
    """Print which steps would become jobs, of what size, behind which others."""
    width = max(map(len, pipeline.steps))
    for name, step in pipeline.steps.items():
        if name not in todo:
            print(f"{name:{width}}  finished, or has a job")
            continue
        after = ", ".join(parent for parent in step.parents if parent in todo)
        note = f"after {after}" if after else ""
        size = "one task"
        if name in drafts:
            job = drafts[name].job
            size = f"{job.nodes} x {job.tasks_per_node} ranks, {job.time or 'no limit'}"
        print(f"{name:{width}}  {size:24}  {note}".rstrip())


def _drop(state: StepState | None) -> None:
    """Take a job that can never start, since its parent failed, out of the queue.

    Raises:
        ConfigError: it stays there, and would be a second job of its step.
    """
    if state is None or state.job is None or not job_state(state.job):
        return
    if problem := sbatch.cancel([state.job]):
        raise ConfigError(f"{problem}; try again when Slurm answers")


def _show(pipeline: Pipeline, table: PipelineState) -> None:
    """Print every step's job, and what to do next."""
    width = max(map(len, table.steps))
    for name, step in table.steps.items():
        after = [parent for parent in step.parents if table.steps[parent].state in ALIVE]
        note = f"after {', '.join(after)}" if after else ""
        job = f"job {step.job}" if step.state in ALIVE else ""
        print(f"{name:{width}}  {step.state:9}  {job:10}  {note}".rstrip())
    print(f"\nkuroshio watch {pipeline.folder}\nthe same command goes on where a step has failed")
