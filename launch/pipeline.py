"""``kuroshio run pipeline=NAME``: the steps of a pipeline on this machine, one after another."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from launch import run
from launch.graph import lineage, work
from launch.graph.check import Values, check_stages, compose_runs
from launch.graph.definition import ExportOptions, Pipeline, Step, read_pipeline
from launch.graph.state import PipelineState, StepState, read_state, write_state
from trainer.errors import EXIT_RESUME, ConfigError, KuroshioError
from trainer.lives import utc_now

STOPPED_BY_SIGNAL = 128  # exit codes from here on say which signal killed a rank


def main(words: Sequence[str]) -> int:
    """Run a pipeline here; return 0, or the exit code of the first step that failed.

    Args:
        words: ``pipeline=NAME``, ``dir=FOLDER``, ``KEY=VALUE`` for every run, ``STEP.KEY=VALUE``
            for one, and ``--dry-run``.

    Raises:
        ConfigError: whatever can be known to be wrong before the first step.
    """
    pipeline = read_pipeline([word for word in words if word != "--dry-run"])
    composed = compose_runs(pipeline)
    refuse_changes(pipeline, composed)
    run.name_accelerator()
    check_stages(pipeline, composed)
    if "--dry-run" in words:
        for step in pipeline.steps.values():
            print(f"{_outlook(pipeline, step):8} {describe(step)}")
        return 0
    state = new_state(pipeline, composed, "run", None)
    codes: list[int] = []
    for step in pipeline.steps.values():
        state, code = _take_turn(pipeline, step, composed, state)
        codes += [code] if code else []
        if code == EXIT_RESUME:
            break
    _show(pipeline, state)
    return codes[0] if codes else 0


def new_state(
    pipeline: Pipeline, composed: Mapping[str, Values], launched: Any, cluster: str | None
) -> PipelineState:
    """Return the state of a pipeline before its steps are looked at, with what earlier calls saw."""
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
    lineage.write_json(
        lineage.record_path(pipeline.folder, step.name), _record(pipeline, step, composed)
    )


def refuse_changes(pipeline: Pipeline, composed: Mapping[str, Values]) -> None:
    """Refuse to take up a pipeline whose steps were begun as something else.

    Raises:
        ConfigError: what differs in which step, and how to go on.
    """
    lines, stale = [], set[str]()
    for step in pipeline.steps.values():
        before = lineage.read_json(lineage.record_path(pipeline.folder, step.name))
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
    inputs = lineage.read_json(lineage.inputs_path(pipeline.folder, step.name))
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


def describe(step: Step) -> str:
    """Return a step as a command that a user could type."""
    if step.kind == "run":
        words = shlex.join([*step.words, f"run_dir={step.folder}"])
        return f"{step.name}: kuroshio run {words}"
    if isinstance(step.options, ExportOptions):
        flags = " ".join(work.export_flags(step.options))
        return f"{step.name}: kuroshio export {step.options.run} {step.folder} {flags}"
    return f"{step.name}: tokenizer {step.folder}"


def _take_turn(
    pipeline: Pipeline, step: Step, composed: Mapping[str, Values], state: PipelineState
) -> tuple[PipelineState, int]:
    """Run a step if nothing holds it; return the state after it and its exit code."""
    missing = [parent for parent in step.parents if state.steps[parent].state != "done"]
    if missing:
        reason = f"{', '.join(missing)} has not finished"
        return _noted(pipeline, state, step, state="held", reason=reason), 0
    reason: str | None = None
    code, started = 0, utc_now()
    try:
        if is_done(pipeline, step):
            print(f"{step.name}: finished, its inputs unchanged", flush=True)
            return _noted(pipeline, state, step, state="done"), 0
        print(f"\n{describe(step)}", flush=True)
        record_step(pipeline, step, composed)
        state = _noted(pipeline, state, step, state="running", started=started)
        code = _do(pipeline, step, composed)
    except KuroshioError as error:
        code, reason = error.exit_code, str(error)
        print(f"kuroshio: step {step.name}: {error}", file=sys.stderr)
    outcome = {0: "done", EXIT_RESUME: "stopped"}.get(code, "failed")
    facts = {"ended": utc_now(), "exit_code": code, "reason": reason}
    return _noted(pipeline, state, step, state=outcome, **facts), code


def _do(pipeline: Pipeline, step: Step, composed: Mapping[str, Values]) -> int:
    if step.kind != "run":
        work.do_step(pipeline.folder, step.name)
        return 0
    lineage.begin(pipeline.folder, step.name)
    return run.start_ranks(composed[step.name])


def _noted(pipeline: Pipeline, table: PipelineState, step: Step, **values: Any) -> PipelineState:
    table = table.changed(step.name, **values)
    write_state(pipeline.folder, table)
    return table


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


def _outlook(pipeline: Pipeline, step: Step) -> str:
    return "finished" if lineage.is_complete(pipeline.folder, step.name) else "to do"


def _show(pipeline: Pipeline, state: PipelineState) -> None:
    """Print what became of every step, and how to go on."""
    print()
    for name, step in state.steps.items():
        reason = f"  {step.reason.splitlines()[0]}" if step.reason else ""
        print(f"{name:16} {step.state:8}{reason}")
    if any(step.state != "done" for step in state.steps.values()):
        words = shlex.join(pipeline.overrides)
        print(f"\nmend what failed; `kuroshio run {words}` goes on from there")
