"""``DIR/pipeline.json``: every step of a pipeline and what became of it.

Only the verb writes it, never a job: two jobs would overwrite each other's lines. ``read_states``
adds what jobs have left in the steps' folders, and what Slurm says of them. Standard library and
YAML only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from launch.graph.lineage import is_complete, work_folder
from launch.json_file import read_json, write_json
from launch.slurm_queue import ENDING, LIVING, ask_squeue, job_state
from trainer.config import build
from trainer.errors import CheckpointError
from trainer.lives import Life, read_lives, utc_now
from trainer.metrics.run_facts import SUBMISSION_NAME

STATE_FILE = "pipeline.json"
FORMAT = 1
NEVER = "DependencyNeverSatisfied"  # squeue's reason; the jobs waited for may be made anew since
REQUEUED, RESTARTED = "requeue", "restart"  # what the end of a job decided
REQUEUE_SHOWS_S = 300  # until Slurm, asked several times, must have the job in its queue again
BROKEN = ("failed", "held", "stopped")  # states of a parent that hold a child
State = Literal["waiting", "running", "submitted", "done", "failed", "held", "stopped"]


@dataclass(frozen=True)
class StepState:
    """One step as the table of a pipeline shows it."""

    kind: Literal["run", "export", "tokenizer"]
    stage: str | None  # of a run
    folder: str
    parents: list[str]
    state: State = "waiting"
    job: str | None = None  # Slurm's number
    started: str | None = None
    ended: str | None = None
    exit_code: int | None = None
    reason: str | None = None  # why it failed, is held or was left out


@dataclass(frozen=True)
class PipelineState:
    """The whole file."""

    pipeline: str
    file: str
    overrides: list[str]
    launched: Literal["run", "submit"]
    cluster: str | None
    steps: dict[str, StepState]
    updated: str = ""
    format: int = FORMAT

    def changed(self, step: str, **values: Any) -> PipelineState:
        """Return the state with other values for one step."""
        new = dataclasses.replace(self.steps[step], **values)
        return dataclasses.replace(self, steps={**self.steps, step: new})


def write_state(folder: Path, state: PipelineState) -> None:
    """Write ``pipeline.json``, whole or not at all."""
    write_json(folder / STATE_FILE, dataclasses.asdict(state) | {"updated": utc_now()})


def read_state(folder: Path) -> PipelineState | None:
    """Return what the verb wrote last; None when the folder holds no pipeline.

    Raises:
        CheckpointError: a file that is damaged, or of another version.
    """
    values = read_json(folder / STATE_FILE)
    if values is None:
        return None
    problems: list[str] = []
    state = build(PipelineState, values, STATE_FILE, problems)
    if state is None or state.format != FORMAT:
        raise CheckpointError(f"{folder / STATE_FILE}: {'; '.join(problems) or 'other version'}")
    return state


def read_states(folder: Path) -> dict[str, StepState]:
    """Return every step as it is now: done, alive in Slurm, failed, or held by a parent.

    Raises:
        CheckpointError: the folder holds no pipeline, or a damaged one.
    """
    state = read_state(folder)
    if state is None:
        raise CheckpointError(f"{folder} holds no {STATE_FILE}, so it is no pipeline's folder")
    now: dict[str, StepState] = {}
    for name, step in state.steps.items():
        now[name] = _look(folder, name, step, now)
    return now


def _look(folder: Path, name: str, step: StepState, known: Mapping[str, StepState]) -> StepState:
    if is_complete(folder, name):
        return dataclasses.replace(step, state="done", reason=None)
    if step.job is None or step.state not in ("submitted", "running"):
        return step
    step = dataclasses.replace(step, job=_newest_job(folder, name) or step.job)
    broken = [p for p in step.parents if p in known and known[p].state in BROKEN]
    slurm = job_state(str(step.job))
    if slurm in (*LIVING, ENDING):
        return dataclasses.replace(step, state="running")
    if broken:
        reason = f"{', '.join(broken)} has not finished, so job {step.job} cannot start"
        return dataclasses.replace(step, state="held", reason=reason)
    if slurm == "PENDING" and ask_squeue(str(step.job), "%r") == NEVER:
        reason = f"job {step.job} waits for one that failed, and cannot start"
        return dataclasses.replace(step, state="held", reason=reason)
    if slurm != "" or _is_between_lives(_last_life(folder, name, step)):
        return step  # it waits, for its next life too, or nobody knows
    return dataclasses.replace(step, state="failed", **_last_words(folder, name, step))


def _newest_job(folder: Path, name: str) -> str | None:
    """Return the job of a run that was resumed by itself since its pipeline was submitted."""
    jobs = (read_json(folder / name / SUBMISSION_NAME) or {}).get("job_ids")
    return str(jobs[-1]) if jobs else None


def _place(folder: Path, name: str, step: StepState) -> Path:
    return folder / name if step.kind == "run" else work_folder(folder, name)


def _last_life(folder: Path, name: str, step: StepState) -> Life:
    """Return what the last life of a step's job left, empty when it said nothing."""
    lives = read_lives(_place(folder, name, step))
    return next((life for life in reversed(lives) if life.get("job") == step.job), {})


def _is_between_lives(life: Life) -> bool:
    """Return whether a job's end has just asked for its next life, which Slurm shows later."""
    if life.get("decision") != REQUEUED:
        return False
    age = datetime.now(timezone.utc) - datetime.fromisoformat(str(life["decided"]))
    return age.total_seconds() < REQUEUE_SHOWS_S


def _last_words(folder: Path, name: str, step: StepState) -> dict[str, Any]:
    """Return why a step's last life ended, as far as it could say so."""
    life = _last_life(folder, name, step)
    logs = _place(folder, name, step) / "logs"
    reason = life.get("decision_reason") or life.get("reason")
    if life.get("decision") in (REQUEUED, RESTARTED):
        reason = f"job {step.job} ended between two lives; its output is in {logs}"
    return {
        "exit_code": life.get("exit_code"),
        "ended": life.get("ended"),
        "reason": reason or f"job {step.job} ended without a word; its output is in {logs}",
    }
