"""``kuroshio run pipeline=NAME``: the steps of a pipeline on this machine, one after another."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from launch import run
from launch.file_modes import private_files, wants_sharing
from launch.graph import lineage, progress, work
from launch.graph.check import Values, check_sources, check_stages, compose_runs
from launch.graph.definition import ExportOptions, Pipeline, Step, read_pipeline
from launch.graph.state import PipelineState, write_state
from trainer.errors import EXIT_RESUME, KuroshioError
from trainer.lives import utc_now


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
    progress.refuse_changes(pipeline, composed)
    check_sources(pipeline, composed)
    run.name_accelerator()
    check_stages(pipeline, composed)
    if "--dry-run" in words:
        for step in pipeline.steps.values():
            print(f"{_outlook(pipeline, step):8} {describe(step)}")
        return 0
    with private_files(any(map(wants_sharing, composed.values()))):
        state = progress.new_state(pipeline, composed, "run", None)
        codes: list[int] = []
        for step in pipeline.steps.values():
            state, code = _take_turn(pipeline, step, composed, state)
            codes += [code] if code else []
            if code == EXIT_RESUME:
                break
    _show(pipeline, state)
    return codes[0] if codes else 0


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
    error_text: str | None = None
    code, started = 0, utc_now()
    try:
        if progress.is_done(pipeline, step):
            print(f"{step.name}: finished, its inputs unchanged", flush=True)
            return _noted(pipeline, state, step, state="done"), 0
        print(f"\n{describe(step)}", flush=True)
        progress.record_step(pipeline, step, composed)
        state = _noted(pipeline, state, step, state="running", started=started)
        code = _do(pipeline, step, composed)
    except KuroshioError as error:
        code, error_text = error.exit_code, str(error)
        print(f"kuroshio: step {step.name}: {error}", file=sys.stderr)
    except BaseException as error:  # a bug, or Ctrl-C: nobody else can say that it runs no more
        reason = f"{type(error).__name__}: {error}"
        _noted(pipeline, state, step, state="failed", ended=utc_now(), exit_code=1, reason=reason)
        raise
    outcome = {0: "done", EXIT_RESUME: "stopped"}.get(code, "failed")
    facts = {"ended": utc_now(), "exit_code": code, "reason": error_text}
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
