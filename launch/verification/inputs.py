"""What a run was made of, as its newest checkpoint recorded it: is it still the same? No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from launch.snapshot import hash_code
from launch.verification.check import Check, ok, problem, unchecked
from trainer.disk import hash_file
from trainer.engine.manifest import list_steps, read_manifest
from trainer.errors import CheckpointError, KuroshioError
from trainer.lives import CHECKPOINTS_NAME, read_lives

TOPIC, SOURCES, REWARDS = "inputs", "data.sources.", "stage.rewards."
BACK = "bring the old one back: a resumed run is refused, and a replay would be of other data"


def recorded_inputs(run_dir: Path) -> dict[str, str]:
    """Return the identities in the newest readable manifest, empty when there is none."""
    for path in list_steps(run_dir / CHECKPOINTS_NAME):
        try:
            inputs = read_manifest(path)["state"].get("inputs")
        except CheckpointError:  # named by its own check
            continue
        if isinstance(inputs, dict):
            return inputs
    return {}


def check_inputs(run_dir: Path, config: Mapping[str, Any]) -> Iterator[Check]:
    """Yield a result for each thing the run reads. Relative paths are seen from here."""
    inputs = recorded_inputs(run_dir)
    if not inputs:
        yield unchecked(TOPIC, "no checkpoint says what the run read")
    for key, recorded in inputs.items():
        if key.startswith(SOURCES):
            yield _check_store(key, recorded, config)
        else:
            yield _check_identity(key, recorded, config)
    if any(key.startswith(SOURCES) for key in inputs):
        yield from _check_sources(inputs, config)


def _check_identity(key: str, recorded: str, config: Mapping[str, Any]) -> Check:
    path, identify = find_input(key, config)
    if path is None:
        return unchecked(TOPIC, f"{key}: config.yaml does not say where it is")
    if not path.exists():
        return unchecked(TOPIC, f"{key}: {path} is not there (any more)")
    try:
        now = identify(path)
    except KuroshioError as error:
        return problem(TOPIC, f"{key}: {error}", BACK)
    if now != recorded:
        return problem(TOPIC, f"{key}: {path} was {recorded[:12]}, now it is {now[:12]}", BACK)
    return ok(TOPIC, f"{key}: {path} is the same ({recorded[:12]})")


def find_input(key: str, config: Mapping[str, Any]) -> tuple[Path | None, Callable[[Path], str]]:
    """Return where an input of a run is, and what tells it from another one."""
    from tokenizer.load import fingerprint
    from trainer.inputs import identify_adapter, identify_weights
    from trainer.models.identity import model_identity

    model, stage = config.get("model") or {}, config.get("stage") or {}
    place: Any = None
    identify: Callable[[Path], str] = model_identity
    if key == "tokenizer":
        place, identify = (
            (config.get("tokenizer") or {}).get("path") or model.get("path"),
            fingerprint,
        )
    elif key == "model.path":
        place, identify = model.get("path"), identify_weights
    elif key == "peft.adapter":
        place, identify = (config.get("peft") or {}).get("adapter"), identify_adapter
    elif key == "stage.critic":
        place = stage.get("critic")
    elif key.startswith(REWARDS):
        name = key.removeprefix(REWARDS).removesuffix(".path")
        place = ((stage.get("rewards") or {}).get(name) or {}).get("path")
        identify = hash_file if place and Path(place).is_file() else model_identity
    return (Path(place) if place else None), identify


def _check_store(key: str, recorded: str, config: Mapping[str, Any]) -> Check:
    from trainer.data.prepared.store import verify

    folder = Path(str((config.get("data") or {}).get("store_dir"))).expanduser() / recorded
    if not folder.is_dir():
        return unchecked(TOPIC, f"{key}: the token store {folder} is not there (any more)")
    try:
        verify(folder)
    except (KuroshioError, OSError) as error:
        return problem(TOPIC, f"{key}: {error}", f"delete {folder}; the run prepares it again")
    return ok(TOPIC, f"{key}: token store {folder}, hashes right")


def _check_sources(inputs: Mapping[str, str], config: Mapping[str, Any]) -> Iterator[Check]:
    """Yield whether the files would still be prepared as what the run was trained on."""
    from tokenizer.load import sentencepiece_file
    from trainer.config import load_config
    from trainer.data.prepared.prepare import plan_sources
    from trainer.inputs import tokenizer_path

    try:
        whole = load_config(config)
        path = tokenizer_path(whole)
        if path is None or not (Path(path).is_dir() or sentencepiece_file(path)):
            yield unchecked(TOPIC, f"files of data.sources: the tokenizer {path} is not there")
            return
        plans = plan_sources(whole.data, path)
    except (KuroshioError, OSError) as error:
        yield unchecked(TOPIC, f"files of data.sources: {error}")
        return
    for plan in plans:
        recorded = inputs.get(f"{SOURCES}{plan.name}")
        if recorded is not None and plan.folder.name != recorded:
            what = f"its files, or how they are read, changed (now {plan.folder.name})"
            yield problem(TOPIC, f"{SOURCES}{plan.name}: trained on {recorded}; {what}", BACK)
        else:
            yield ok(TOPIC, f"{SOURCES}{plan.name}: {len(plan.files)} files are the same")


def check_code(run_dir: Path) -> Check:
    """Compare the snapshot of a submitted run with the code that its last life ran."""
    noted = [life["code"] for life in read_lives(run_dir) if life.get("code")]
    folder = run_dir / "code"
    if not folder.is_dir():
        return unchecked("code", "the run was started from a checkout and keeps no copy of it")
    if not noted:
        return unchecked("code", "no life noted which code it ran")
    if hash_code(folder) != noted[-1]:
        what = f"{folder} is not what the last life ran ({noted[-1][:12]})"
        return problem("code", what, "bring the old files back, or submit the run again")
    return ok("code", f"{folder} is what the last life ran ({noted[-1][:12]})")
