"""Every committed checkpoint against its manifest, and what unfinished writes left. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from launch.verification.check import Check, ok, problem, unchecked
from trainer.engine.manifest import file_problem, list_leftovers, list_steps, read_manifest
from trainer.errors import CheckpointError
from trainer.lives import CHECKPOINTS_NAME

TOPIC = "checkpoint"
Count = Callable[[int], None]


def num_bytes(run_dir: Path) -> int:
    """Return how much there is to hash; what cannot be told counts nothing."""
    total = 0
    for path in list_steps(run_dir / CHECKPOINTS_NAME):
        try:
            total += sum(facts["bytes"] for facts in read_manifest(path)["files"].values())
        except CheckpointError:  # named by the check itself
            continue
    return total


def check_checkpoints(run_dir: Path, config: Mapping[str, Any], count: Count) -> Iterator[Check]:
    """Yield a result for each checkpoint, newest first; ``count`` is told the bytes read."""
    steps = list_steps(run_dir / CHECKPOINTS_NAME)
    if not steps:
        yield unchecked(TOPIC, "none was committed yet")
    for path in steps:
        yield check_one(path, config, count)


def check_one(path: Path, config: Mapping[str, Any], count: Count) -> Check:
    """Compare a checkpoint's files with its manifest, and that with the run's config."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return _damaged(path, str(error))
    wrong = compare_config(path, manifest, config)
    for name, facts in sorted(manifest["files"].items()):
        found = file_problem(path / name, facts, read=True, count=count)
        if found and not path.exists():
            return unchecked(TOPIC, f"{path.name} was deleted meanwhile: the run goes on")
        wrong += [f"{name} {found}"] if found else []
    unknown = sorted(p.name for p in path.iterdir() if p.name not in manifest["files"])
    unknown.remove("manifest.json")
    wrong += [f"{name} belongs to no manifest" for name in unknown]
    if wrong:
        return _damaged(path, "; ".join(wrong))
    size = sum(facts["bytes"] for facts in manifest["files"].values())
    return ok(
        TOPIC,
        f"{path.name}: {len(manifest['files'])} files, {size / 1e6:,.1f} MB, "
        f"{len(manifest['parameters'])} parameters, hashes right",
    )


def compare_config(path: Path, manifest: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Return what in a manifest contradicts the folder's name or the run's frozen config."""
    wrong = []
    if int(path.name[5:]) != manifest["step"]:
        wrong.append(f"its manifest is of step {manifest['step']}")
    if not config:
        return wrong
    last = (config.get("loop") or {}).get("max_steps") or 0
    if last and manifest["step"] > last:
        wrong.append(f"config.yaml ends the run at step {last}")
    inputs = manifest["state"].get("inputs")
    if not isinstance(inputs, dict):
        return [*wrong, "its manifest names no inputs"]
    read = {key.removeprefix("data.sources.") for key in inputs if key.startswith("data.sources.")}
    named = set((config.get("data") or {}).get("sources") or {})
    if read != named:
        wrong.append(
            f"it was trained on the sources {sorted(read)}, config.yaml has {sorted(named)}"
        )
    if ("model.path" in inputs) != bool((config.get("model") or {}).get("path")):
        wrong.append("it and config.yaml disagree on whether the run began from a model folder")
    return wrong


def _damaged(path: Path, what: str) -> Check:
    remedy = (
        "restore the folder from a copy, or remove it: a resumed run goes back to the newest whole "
        "checkpoint by itself"
    )
    return problem(TOPIC, f"{path.name}: {what}", remedy)


def check_leftovers(run_dir: Path, is_alive: bool) -> Iterator[Check]:
    """Yield what unfinished writes left in the run's folder."""
    topic, folder = "left-overs", run_dir / CHECKPOINTS_NAME
    found = list_leftovers(folder) if folder.is_dir() else []
    lost = [p for p in found if p.name.endswith(".old") and not _final(p).exists()]
    for path in lost:
        yield problem(
            topic,
            f"{path.name} was put aside by a save that was killed, and its successor is not there",
            f"go on with the run, which puts it back, or rename it to {_final(path).name}",
        )
    others = [p.name for p in [*found, *list_leftovers(run_dir)] if p not in lost]
    if others and is_alive:
        yield unchecked(topic, f"the run lives and may be writing {', '.join(others)}")
    elif others:
        yield ok(topic, f"unfinished writes, which nothing reads: {', '.join(others)}")
    elif not lost:
        yield ok(topic, "none")


def _final(old: Path) -> Path:
    return old.with_name(old.name.removeprefix(".").removesuffix(".old"))
