"""How far a pipeline is: what was begun as something else, what need not be done again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from launch.graph import lineage
from launch.graph.check import Values
from launch.graph.definition import Pipeline, Step
from launch.graph.state import PipelineState, StepState, read_state
from launch.json_file import read_json, write_json
from trainer.errors import ConfigError


def new_state(
    pipeline: Pipeline,
    composed: Mapping[str, Values],
    launched: Literal["run", "submit"],
    cluster: str | None,
) -> PipelineState:
    """Return the state of a pipeline before its turn, with what an earlier call saw."""
    known = read_state(pipeline.folder)
    steps = {}
    for step in pipeline.steps.values():
        stage = composed[step.name]["stage"]["name"] if step.kind == "run" else None
        new = StepState(step.kind, stage, str(step.folder), list(step.parents))
        old = known.steps.get(step.name, new) if known else new
        steps[step.name] = dataclasses.replace(
            new, job=old.job, started=old.started, ended=old.ended, exit_code=old.exit_code
        )
    file, overrides = str(pipeline.file), list(pipeline.overrides)
    return PipelineState(pipeline.name, file, overrides, launched, cluster, steps)


def record_step(pipeline: Pipeline, step: Step, composed: Mapping[str, Values]) -> None:
    """Write down what a step is, for its own start and for later ones to compare with."""
    path = lineage.record_path(pipeline.folder, step.name)
    write_json(path, _record(pipeline, step, composed))


def refuse_changes(pipeline: Pipeline, composed: Mapping[str, Values]) -> None:
    """Refuse to take up a pipeline whose steps were begun as something else.

    Raises:
        ConfigError: what differs in which step, and how to go on.
    """
    lines, stale = [], set[str]()
    for step in pipeline.steps.values():
        before = read_json(lineage.record_path(pipeline.folder, step.name))
        if before is None or not step.folder.exists():
            continue
        changes = _changes(before, _record(pipeline, step, composed))
        if changes:
            lines += [f"step {step.name} was begun with other values:", *changes]
            stale |= {step.name, *pipeline.descendants(step.name)}
    if lines:
        raise ConfigError("\n".join([*lines, remedy(pipeline, stale)]))


def remedy(pipeline: Pipeline, stale: set[str]) -> str:
    """Return how to make steps again that were made from something else."""
    there = [str(s.folder) for n, s in pipeline.steps.items() if n in stale and s.folder.exists()]
    return (
        "give the old values, or dir=FOLDER to keep both, or make them anew after\n"
        f"  rm -r {' '.join(there)}"
    )


def is_done(pipeline: Pipeline, step: Step) -> bool:
    """Say whether a step is finished, from what its parents hold now.

    Raises:
        ConfigError: it is begun or finished, and a parent has another output by now.
    """
    if not step.folder.exists():
        return False
    complete = lineage.is_complete(pipeline.folder, step.name)
    inputs = read_json(lineage.inputs_path(pipeline.folder, step.name))
    if inputs is None:
        return complete and not step.parents
    now = {p: lineage.output_facts(pipeline.folder, p) for p in step.parents}
    if changed := lineage.changed_inputs(inputs["parents"], now):
        stale = {step.name, *pipeline.descendants(step.name)}
        raise ConfigError(
            f"step {step.name} was made from other inputs: {'; '.join(changed)}\n"
            + remedy(pipeline, stale)
        )
    return complete


def _record(pipeline: Pipeline, step: Step, composed: Mapping[str, Values]) -> lineage.Record:
    record: lineage.Record = {
        "pipeline": pipeline.name,
        "kind": step.kind,
        "parents": list(step.parents),
    }
    if step.kind == "run":
        values = composed[step.name]
        return record | {"stage": values["stage"]["name"], "values": values}
    assert step.options is not None
    return record | {"stage": None, "options": dataclasses.asdict(step.options)}


def _changes(before: lineage.Record, now: lineage.Record) -> list[str]:
    if before["kind"] != now["kind"]:
        return [f"  it was a step of kind {before['kind']}, now {now['kind']}"]
    key = "values" if now["kind"] == "run" else "options"
    return [f"  {line}" for line in lineage.changed_values(before[key], now[key])]
