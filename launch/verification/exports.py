"""Exports of a run: their files, their vocabulary, and some of their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from launch.exports import read_exports
from launch.verification.check import Check, ok, problem, unchecked
from trainer.disk import hash_file
from trainer.engine.manifest import MANIFEST_NAME, file_problem
from trainer.errors import KuroshioError
from trainer.lives import CHECKPOINTS_NAME

TOPIC = "exports"
NUM_SAMPLES = 8  # tensors of a model that are made again and compared
REMEDY = "export the run again, or bring the old files back"


def check_exports(
    run_dir: Path, config: Mapping[str, Any], count: Callable[[int], None]
) -> Iterator[Check]:
    """Yield the results of every export that the run knows of."""
    for record in read_exports(run_dir):
        folder = Path(str(record["folder"]))
        if not folder.is_dir():
            yield unchecked(TOPIC, f"{folder} is not there (any more), or was moved")
            continue
        yield check_files(folder, record["files"], count)
        yield from _check_content(run_dir, config, folder, record)


def num_bytes(run_dir: Path) -> int:
    """Return how much of the exports there is to hash."""
    records = [r for r in read_exports(run_dir) if Path(str(r["folder"])).is_dir()]
    return sum(facts["bytes"] for record in records for facts in record["files"].values())


def check_files(
    folder: Path, files: Mapping[str, dict[str, Any]], count: Callable[[int], None]
) -> Check:
    """Compare an export's files with the run's record of them."""
    wrong = []
    for name, facts in files.items():
        if found := file_problem(folder / name, facts, read=True, count=count):
            wrong.append(f"{name} {found}")
    if wrong:
        return problem(TOPIC, f"{folder}: {'; '.join(wrong)}", REMEDY)
    return ok(TOPIC, f"{folder}: {len(files)} files, hashes right")


def _check_content(
    run_dir: Path, config: Mapping[str, Any], folder: Path, record: Mapping[str, Any]
) -> Iterator[Check]:
    from tokenizer.pair import check_pair

    try:
        if not record.get("adapter"):
            check_pair(folder, folder)
            yield ok(TOPIC, f"{folder}: its tokenizer fits its embedding")
    except KuroshioError as error:
        yield problem(TOPIC, str(error), REMEDY)
    checkpoint = run_dir / CHECKPOINTS_NAME / str(record.get("checkpoint"))
    if not (checkpoint / MANIFEST_NAME).is_file():
        yield unchecked(TOPIC, f"{folder}: its {checkpoint.name} was deleted by the rotation")
    elif hash_file(checkpoint / MANIFEST_NAME) != record.get("manifest_sha256"):
        yield unchecked(TOPIC, f"{folder}: {checkpoint.name} was saved again since")
    else:
        yield check_weights(run_dir, config, folder, checkpoint, record)


def check_weights(
    run_dir: Path,
    config: Mapping[str, Any],
    folder: Path,
    checkpoint: Path,
    record: Mapping[str, Any],
) -> Check:
    """Make some of an export's tensors again from the checkpoint, and compare them by name."""
    from safetensors import SafetensorError

    try:
        wanted, made, dtype = _open_weights(run_dir, config, checkpoint, record)
        wrong, num = _compare(folder, wanted, made, dtype)
    except (KuroshioError, OSError, KeyError, SafetensorError) as error:
        return unchecked(TOPIC, f"{folder}: its weights cannot be made again: {error}")
    if wrong:
        return problem(TOPIC, f"{folder}: {'; '.join(wrong)}", REMEDY)
    return ok(TOPIC, f"{folder}: {num} of {len(wanted)} tensors are those of {checkpoint.name}")


def _open_weights(
    run_dir: Path, config: Mapping[str, Any], checkpoint: Path, record: Mapping[str, Any]
) -> tuple[dict[str, list[int]], Callable[[str], Any], Any]:
    """Return shapes by name in the export, what makes a tensor, and its type."""
    from launch.final_model import open_final_weights
    from trainer.config import load_config
    from trainer.engine.committed import Checkpoint, Reader
    from trainer.engine.manifest import read_manifest
    from trainer.engine.precision import DTYPES
    from trainer.models.actor_critic import policy_shapes
    from trainer.models.adapter_files import file_name

    found = Checkpoint(checkpoint, read_manifest(checkpoint))
    precision = record.get("dtype")
    name = str(found.manifest["precision"] if precision in (None, "auto") else precision)
    if record.get("adapter"):
        reader = Reader(found)
        names = {file_name(n): n for n in policy_shapes(reader.shapes)}
        shapes = {short: list(reader.shapes[whole]) for short, whole in names.items()}
        return shapes, lambda short: reader.read_whole(names[short]), DTYPES[name]
    base_kind = str(record.get("base", "original"))
    weights = open_final_weights(load_config(config), run_dir, found, base_kind)
    return weights.shapes, weights.read, DTYPES[name]


def _compare(
    folder: Path, wanted: Mapping[str, list[int]], made: Callable[[str], Any], dtype: Any
) -> tuple[list[str], int]:
    """Return what differs, and how many tensors were looked at."""
    import torch

    from trainer.models.shards import open_tensors

    files = [open_tensors(path) for path in sorted(folder.glob("*.safetensors"))]
    there = {name: file for file in files for name in file.keys()}  # noqa: SIM118
    wrong = [f"{name} is missing" for name in sorted(wanted.keys() - there.keys())[:3]]
    wrong += [f"{name} is of no checkpoint" for name in sorted(there.keys() - wanted.keys())[:3]]
    shared = sorted(wanted.keys() & there.keys())
    sample = shared[:: max(1, len(shared) // NUM_SAMPLES)]
    for name in sample:
        found, expected = there[name].get_tensor(name), made(name).to(dtype)
        if found.shape != expected.shape or not torch.equal(found, expected):
            wrong.append(f"{name} is not what the checkpoint gives")
    return wrong, len(sample)
