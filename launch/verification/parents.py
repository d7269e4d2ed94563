"""The runs and exports that a run was made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launch.graph import lineage
from launch.monitor.sources import is_run
from launch.verification.check import Check, ok, problem, unchecked
from trainer.disk import hash_file
from trainer.errors import KuroshioError

TOPIC, OUTPUTS = "parents", "manifest.json"
NEAR = 3  # folders above an input that may be the run it is of
BACK = "bring the old files back; this run was made of them"


def check_parents(run_dir: Path) -> Iterator[Check]:
    """Yield whether the steps that a pipeline's run was made of still give what they gave it."""
    folder, step = run_dir.parent, run_dir.name
    try:
        record = lineage.read_json(lineage.record_path(folder, step))
        begun = lineage.read_json(lineage.inputs_path(folder, step)) or {}
    except KuroshioError as error:
        yield problem(TOPIC, str(error), "bring the file back from a copy")
        return
    before: Mapping[str, lineage.Facts] = begun.get("parents") or {}
    for parent in (record or {}).get("parents") or []:
        yield _check_parent(folder, parent, before.get(parent))


def _check_parent(folder: Path, parent: str, before: lineage.Facts | None) -> Check:
    if not (folder / parent).exists():
        return unchecked(TOPIC, f"step {parent}: {folder / parent} is not there (any more)")
    try:
        now = lineage.output_facts(folder, parent)
        lineage.verify_model(folder, parent)
    except (KuroshioError, OSError) as error:
        return problem(TOPIC, str(error), BACK)
    except (KeyError, TypeError) as error:  # a manifest that does not say what it should
        return problem(TOPIC, f"step {parent}: its result is damaged (no {error})", BACK)
    if before is None:
        return unchecked(TOPIC, f"step {parent}: nobody noted what it gave this run")
    if changed := lineage.changed_inputs({parent: before}, {parent: now}):
        return problem(TOPIC, f"step {'; '.join(changed)}", BACK)
    return ok(TOPIC, f"step {parent} gives what it gave ({', '.join(now)})")


def find_parents(run_dir: Path, config: Mapping[str, Any]) -> list[Path]:
    """Return the runs' folders that a run was made of: by its pipeline, else by its paths."""
    found: dict[Path, None] = {}
    for parent in _steps_above(run_dir.parent, run_dir.name):
        found[run_dir.parent / parent] = None
    model, tokenizer = config.get("model") or {}, config.get("tokenizer") or {}
    stage, peft = config.get("stage") or {}, config.get("peft") or {}
    rewards = [r for r in (stage.get("rewards") or {}).values() if isinstance(r, dict)]
    places = [model.get("path"), tokenizer.get("path"), peft.get("adapter"), stage.get("critic")]
    for place in [*places, *(reward.get("path") for reward in rewards)]:
        if isinstance(place, str):
            above = [Path(place), *Path(place).absolute().parents][:NEAR]
            found |= {path.absolute(): None for path in above if is_parent(path)}
    return [path for path in found if is_parent(path) and path != run_dir.absolute()]


def is_parent(folder: Path) -> bool:
    """Return whether a folder is a run's, of the vocabulary or of training."""
    return is_run(folder) or (
        (folder / OUTPUTS).is_file() and (folder / lineage.CONFIG_FILE).is_file()
    )


def _steps_above(folder: Path, step: str, depth: int = 2) -> Iterator[str]:
    """Yield the parents of a step, and those of an export among them."""
    try:
        record = lineage.read_json(lineage.record_path(folder, step)) or {}
    except KuroshioError:  # named by ``check_parents``
        return
    for parent in record.get("parents") or []:
        yield parent
        if depth and not is_run(folder / parent):
            yield from _steps_above(folder, parent, depth - 1)


def check_outputs(run_dir: Path) -> Check:
    """Compare the files of a vocabulary run with its manifest."""
    path, remedy = run_dir / OUTPUTS, f"bring the files back, or remove {run_dir} and run it again"
    try:
        manifest = lineage.read_json(path)
    except KuroshioError as error:
        return problem("outputs", str(error), remedy)
    if manifest is None or not manifest.get("complete"):
        return unchecked("outputs", "the run has not finished")
    wrong = []
    for name, facts in manifest["files"].items():
        file = run_dir / name
        if not file.is_file():
            wrong.append(f"{name} is missing")
        elif file.stat().st_size != facts["num_bytes"] or hash_file(file) != facts["sha256"]:
            wrong.append(f"{name} is not what was written")
    if wrong:
        return problem("outputs", "; ".join(wrong), remedy)
    return ok("outputs", f"{len(manifest['files'])} files, hashes right")
