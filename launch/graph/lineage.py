"""What a step was made from: its values and its parents' outputs, recorded and compared.

``DIR/steps/STEP.json`` is written by the verb that starts or submits a step: what the step is.
``DIR/steps/STEP.inputs.json`` is written where the step begins, in its job: what it found there.
Nothing here imports more than the standard library and YAML, except ``begin``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from launch.json_file import read_json, write_json
from launch.run_folder import CHANGEABLE, CONFIG_FILE, differences, matches
from trainer.errors import ConfigError
from trainer.lives import LIVES_NAME, newest_step

Facts = dict[str, str]
Record = dict[str, Any]
RECORDS = "steps"
PAIR_FILE = "kuroshio.json"  # of a model folder: its tokenizer's, template's and weights' hashes
FACTS = {  # in words -> key of a model folder's kuroshio.json
    "tokenizer": "tokenizer_fingerprint",
    "chat template": "template_sha256",
    "model": "model_identity",
}
# Where a step's values may differ without its result being another one.
_PLACES = ("name", "run_dir")


def record_path(folder: Path, step: str) -> Path:
    """Return the file that says what a step of the pipeline in ``folder`` is."""
    return folder / RECORDS / f"{step}.json"


def inputs_path(folder: Path, step: str) -> Path:
    """Return the file that says what a step found when it began."""
    return folder / RECORDS / f"{step}.inputs.json"


def work_folder(folder: Path, step: str) -> Path:
    """Return where the job of a step that is no run keeps its script, its code and its output."""
    return folder / RECORDS / step


def is_complete(folder: Path, step: str) -> bool:
    """Say whether a recorded step has done all it was to do."""
    record, place = read_json(record_path(folder, step)), folder / step
    if record is None:
        return False
    if record["kind"] != "run":
        return place.is_dir()  # written aside: it is there when it is whole
    if record["stage"] == "vocab":
        return bool((read_json(place / "manifest.json") or {}).get("complete"))
    manifest, frozen = _newest_manifest(place), _frozen(place)
    if manifest is None or not frozen:
        return False
    return manifest["step"] >= frozen["loop"]["max_steps"] > 0 and manifest["state"]["evaluated"]


def output_facts(folder: Path, step: str) -> Facts:
    """Return what tells a step's output from another one.

    Raises:
        ConfigError: the step has none yet.
    """
    record, place = read_json(record_path(folder, step)), folder / step
    if record is None or not is_complete(folder, step):
        raise ConfigError(
            f"parent step {step} has not finished: {place} "
            f"{'holds no finished result' if place.exists() else 'is not there'}; run it first"
        )
    if record["kind"] == "tokenizer":
        return {"tokenizer": _sha256(place / "tokenizer.json")}
    model = place if record["kind"] == "export" else place / "model"
    if (model / PAIR_FILE).is_file():
        pair = read_json(model / PAIR_FILE) or {}
        return {words: str(pair.get(key)) for words, key in FACTS.items()}
    if record["kind"] == "export":
        return {"adapter": _sha256(place / "adapter_model.safetensors")}
    if record["stage"] == "vocab":  # of a tokenizer alone
        return {"tokenizer": _sha256(place / "tokenizer" / "tokenizer.json")}
    step_folder = place / "checkpoints" / f"step_{newest_step(place):08d}"
    return {"checkpoint": f"{step_folder.name} {_sha256(step_folder / 'manifest.json')}"}


def begin(folder: Path, step: str) -> None:
    """Check the parents of a step before it does anything, and remember what they gave it.

    Steps that belong to no pipeline have no record, and nothing to check.

    Raises:
        ConfigError: a parent is missing, was changed after it finished, or gives something else
            than when this step began.
    """
    record = read_json(record_path(folder, step))
    if record is None:
        return
    found = {parent: output_facts(folder, parent) for parent in record["parents"]}
    for parent in record["parents"]:
        verify_model(folder, parent)
    place = folder / step
    begun = (place / LIVES_NAME if record["kind"] == "run" else place).exists()
    before = (read_json(inputs_path(folder, step)) or {}).get("parents")
    if before is None or not begun:
        write_json(inputs_path(folder, step), {"parents": found})
    elif changed := changed_inputs(before, found):
        raise ConfigError(f"step {step} began with other inputs: {'; '.join(changed)}")


def begin_run(run_dir: Any) -> None:
    """Do what ``begin`` does for the run folder of a config that is not checked yet."""
    if isinstance(run_dir, str):
        place = Path(run_dir)
        begin(place.parent, place.name)


def changed_inputs(before: Mapping[str, Facts], now: Mapping[str, Facts]) -> list[str]:
    """Return a line for every parent whose output is not what it was."""
    lines = []
    for parent in dict.fromkeys([*before, *now]):
        old, new = before.get(parent), now.get(parent)
        if old is None or new is None:
            lines.append(f"{parent} is {'a new' if old is None else 'no longer a'} parent")
            continue
        keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
        if keys:
            lines.append(f"parent {parent} has another {', '.join(keys)} now")
    return lines


def changed_values(before: Record, now: Record) -> list[str]:
    """Return a line for every value of a step that decides its result and differs."""
    lines = []
    for key, (old, new) in differences(before, now).items():
        if not matches(key, (*CHANGEABLE, *_PLACES)) and not _same_place(old, new):
            lines.append(f"{key}: {old!r} there, {new!r} now")
    return lines


def _same_place(old: Any, new: Any) -> bool:
    """Say whether two values are the same path, one of them written from here."""
    texts = isinstance(old, str) and isinstance(new, str)
    return texts and Path(old).absolute() == Path(new).absolute()


def verify_model(folder: Path, parent: str) -> None:
    """Compare a model folder with what was written down when it was made.

    Raises:
        ConfigError: tokenizer, template or weights are others.
    """
    from tokenizer.load import fingerprint, template_sha256
    from trainer.models.identity import model_identity

    record = read_json(record_path(folder, parent)) or {}
    model = folder / parent if record.get("kind") == "export" else folder / parent / "model"
    pair = read_json(model / PAIR_FILE)
    if pair is None:
        return
    now = {
        "tokenizer": fingerprint(model),
        "chat template": template_sha256(model),
        "model": model_identity(model),
    }
    changed = [words for words, key in FACTS.items() if key in pair and now[words] != pair[key]]
    if changed:
        raise ConfigError(
            f"parent step {parent}: {model} was changed after it was made: another "
            f"{', '.join(changed)} than {PAIR_FILE} says; bring the old files back, or remove "
            f"{folder / parent} and run the pipeline again"
        )


def _newest_manifest(run: Path) -> Record | None:
    return read_json(run / "checkpoints" / f"step_{newest_step(run):08d}" / "manifest.json")


def _frozen(run: Path) -> Record:
    path = run / CONFIG_FILE
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is not there; remove {path.parent} and run it again") from error
