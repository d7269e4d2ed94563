"""Checkpoints by parameter name: safetensors and JSON, committed by a rename.

``checkpoints/step_00000040/`` holds ``manifest.json`` (state, sizes, SHA-256 of every file) and
one ``rank_00000.safetensors`` per rank with that rank's fragments: ``name|master@offset`` and so
on, 1-D fp32. Frozen weights are not written. Nothing depends on ZeRO stage, offload or world size.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trainer.engine import collectives
from trainer.engine.fragments import get_adam_step, set_adam_step
from trainer.errors import CheckpointError, StorageError

if TYPE_CHECKING:  # exporting reads checkpoints without DeepSpeed
    from trainer.engine.engine import Engine

LOG = logging.getLogger(__name__)
FORMAT = 1


def save(engine: Engine, folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write a checkpoint on every rank and commit it.

    Args:
        engine: the trained engine.
        folder: the run's ``checkpoints`` folder.
        step: optimizer steps done.
        state: what else resumes (JSON-able, equal on all ranks).

    Returns:
        The committed folder.

    Raises:
        StorageError: disk full or quota reached; nothing committed before is touched.
    """
    aside, final = folder / f".step_{step:08d}.tmp", folder / f"step_{step:08d}"
    state = {"adam_step": get_adam_step(engine.optimizer), "scaler": engine.scaler_state(), **state}
    _together(lambda: _start(aside, engine.rank == 0), folder, aside)
    _together(lambda: _write_rank(engine, aside), folder, aside)

    def commit() -> None:
        if engine.rank == 0:
            _commit(aside, final, _describe(engine, aside, step, state))

    _together(commit, folder, aside)
    return final


def _together(work: Any, folder: Path, aside: Path) -> None:
    """Run ``work`` on this rank; if it failed on any, clean up and raise on all."""
    failure = None
    try:
        work()
    except (OSError, SafetensorError) as error:
        failure = error
    if not collectives.any_over_ranks(failure is not None):
        return
    shutil.rmtree(aside, ignore_errors=True)
    raise StorageError(_storage_message(folder, failure)) from failure


def _storage_message(folder: Path, failure: Exception | None) -> str:
    if failure is None:
        return f"checkpoint in {folder} was not saved: another rank could not write its part"
    where = folder
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free
    # safetensors keeps the number of the system's error in its message only.
    numbers = (errno.ENOSPC, errno.EDQUOT)
    full = any(f"rrno {n}]" in str(failure) or f"os error {n})" in str(failure) for n in numbers)
    cause = "disk full or quota reached" if full else f"{type(failure).__name__}: {failure}"
    return (
        f"checkpoint in {folder} was not saved: {cause} ({free / 1e6:.1f} MB free). Earlier "
        "checkpoints are intact; free space or lower loop.keep_last, then start the same command"
    )


def _start(aside: Path, is_main: bool) -> None:
    if is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)


def _write_rank(engine: Engine, aside: Path) -> None:
    """Write this rank's fragments and, beside them, their size, hash and shapes."""
    tensors: dict[str, torch.Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for fragment in engine.fragments():
        shapes[fragment.name] = list(fragment.shape)
        for kind, view in fragment.tensors().items():
            # NVMe buffers are reused for the next sub-group, and safetensors wants own storage.
            copy = view.detach().to("cpu", copy=True)
            tensors[f"{fragment.name}|{kind}@{fragment.offset}"] = copy
    path = aside / f"rank_{engine.rank:05d}.safetensors"
    save_file(tensors, path)
    _fsync(path)
    facts = {"bytes": path.stat().st_size, "sha256": _sha256(path), "shapes": shapes}
    write_json(aside / f"rank_{engine.rank:05d}.json", facts)


def _describe(engine: Engine, aside: Path, step: int, state: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest, gathered from the ranks' side files."""
    files, shapes = {}, {}
    for rank in range(engine.world_size):
        facts = json.loads((aside / f"rank_{rank:05d}.json").read_text())
        shapes.update(facts.pop("shapes"))
        files[f"rank_{rank:05d}.safetensors"] = facts
    return {
        "format": FORMAT,
        "step": step,
        "world_size": engine.world_size,
        "zero_stage": engine.config.zero_stage,
        "precision": engine.precision,
        "files": files,
        "parameters": dict(sorted(shapes.items())),
        "state": state,
    }


def _commit(aside: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Make the checkpoint count: manifest last, then one rename."""
    write_json(aside / "manifest.json", manifest)
    for side_file in aside.glob("rank_*.json"):
        side_file.unlink()
    _fsync(aside)
    old = final.with_name(f".{final.name}.old")
    if final.exists():  # the same step saved again: there is one of the two at every moment
        final.rename(old)
    aside.rename(final)
    _fsync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint folder and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Return the optimizer steps done."""
        return int(self.manifest["step"])

    @property
    def state(self) -> dict[str, Any]:
        """Return the loop's state."""
        return self.manifest["state"]


def list_steps(folder: Path) -> list[Path]:
    """Return committed checkpoint folders, newest first."""
    return sorted(folder.glob("step_*"), reverse=True)


def find_newest(folder: Path) -> Checkpoint | None:
    """Return the newest complete checkpoint, walking back over damaged ones and saying so.

    Rank 0 lists the folder and announces each step, since another node's listing may be stale; all
    ranks share the hashing and agree on the answer.

    Returns:
        None when the run has never committed one.

    Raises:
        CheckpointError: checkpoints exist and every one is damaged; never silently from scratch.
    """
    reasons = []
    for step in _announce_steps(folder):
        path = folder / f"step_{step:08d}"
        problem = verify(path)
        if not problem:
            return Checkpoint(path, json.loads((path / "manifest.json").read_text()))
        reasons.append(f"{path.name}: {problem}")
        LOG.warning("checkpoint %s is damaged (%s); walking back", path, problem)
    if reasons:
        raise CheckpointError(
            f"no complete checkpoint in {folder}:\n  " + "\n  ".join(reasons) + "\nRestore one, or "
            "remove the folder to start from the beginning on purpose"
        )
    return None


def _announce_steps(folder: Path) -> Iterator[int]:
    """Yield the committed steps that rank 0 sees, newest first, on every rank."""
    rank, _ = _rank_and_world()
    if rank == 0:
        for old in folder.glob(".step_*.old"):  # killed between the two renames of a commit
            final = folder / old.name.removeprefix(".").removesuffix(".old")
            shutil.rmtree(old) if final.exists() else old.rename(final)
    steps = [int(p.name.removeprefix("step_")) for p in list_steps(folder)] if rank == 0 else []
    for step in [*steps, -1] if rank == 0 else itertools.repeat(-1):
        announced = collectives.broadcast_int(step)
        if announced < 0:
            return
        yield announced


def verify(path: Path) -> str:
    """Return what is wrong with a checkpoint folder, or an empty string; ranks share the work."""
    problem = _verify_share(path)
    if collectives.any_over_ranks(bool(problem)):
        return problem or "another rank found a damaged file"
    return ""


def _verify_share(path: Path) -> str:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        files = sorted(manifest["files"].items())
        manifest["state"], manifest["step"], manifest["parameters"]
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest unreadable ({type(error).__name__}: {error})"
    rank, world_size = _rank_and_world()
    for index, (name, facts) in enumerate(files):
        try:
            problem = _check_file(path / name, facts, read=index % world_size == rank)
        except OSError as error:
            problem = f"is unreadable ({error})"
        if problem:
            return f"{name} {problem}"
    return ""


def _check_file(file: Path, facts: dict[str, Any], *, read: bool) -> str:
    if not file.is_file():
        return "is missing"
    if file.stat().st_size != facts["bytes"]:
        return f"has {file.stat().st_size} bytes instead of {facts['bytes']}"
    if read and _sha256(file) != facts["sha256"]:
        return "does not match its SHA-256"
    return ""


def _rank_and_world() -> tuple[int, int]:
    if not collectives.is_distributed():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


class Reader:
    """Reads parameters of a verified checkpoint by name, whole or in part."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.shapes: dict[str, list[int]] = checkpoint.manifest["parameters"]
        self._files = [safe_open(checkpoint.path / n, "pt") for n in checkpoint.manifest["files"]]
        self._pieces: dict[str, list[tuple[int, int, int, str]]] = defaultdict(list)
        for number, file in enumerate(self._files):
            for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                tensor_name, offset = key.rsplit("@", 1)
                numel = file.get_slice(key).get_shape()[0]
                self._pieces[tensor_name].append((int(offset), numel, number, key))

    def read(self, name: str, kind: str, offset: int, numel: int) -> torch.Tensor:
        """Return elements [offset, offset + numel) of flattened ``name`` as fp32 [numel]."""
        out, filled = torch.empty(numel), 0
        for start, length, number, key in self._pieces[f"{name}|{kind}"]:
            low, high = max(start, offset), min(start + length, offset + numel)
            if low < high:
                piece = self._files[number].get_slice(key)[low - start : high - start]
                out[low - offset : high - offset] = piece
                filled += high - low
        if filled != numel:
            raise CheckpointError(
                f"{self.checkpoint.path}: {name} has {filled} of {numel} elements of {kind}"
            )
        return out

    def read_whole(self, name: str, kind: str = "master") -> torch.Tensor:
        """Return the whole parameter in its own shape, fp32."""
        shape = self.shapes[name]
        return self.read(name, kind, 0, torch.Size(shape).numel()).view(shape)


def load(engine: Engine, checkpoint: Checkpoint) -> None:
    """Restore masters, moments, counters and the model's own weights from a checkpoint.

    Raises:
        CheckpointError: when its parameters are not the engine's trainable ones.
    """
    reader = Reader(checkpoint)
    trainable = engine.trainable()
    _compare_names(trainable, reader.shapes, checkpoint.path)
    for fragment in engine.fragments(write=True):
        if list(fragment.shape) != reader.shapes[fragment.name]:
            raise CheckpointError(
                f"{checkpoint.path}: {fragment.name} has shape {reader.shapes[fragment.name]}, "
                f"the model {list(fragment.shape)}"
            )
        for kind, view in fragment.tensors().items():
            view.copy_(reader.read(fragment.name, kind, fragment.offset, fragment.numel))
    for name, param in trainable.items():
        engine.set_low_precision(param, partial(reader.read_whole, name))
    set_adam_step(engine.optimizer, checkpoint.state["adam_step"])
    engine.load_scaler_state(checkpoint.state["scaler"])


def _compare_names(trainable: dict[str, Any], saved: dict[str, Any], path: Path) -> None:
    missing, extra = sorted(set(trainable) - set(saved)), sorted(set(saved) - set(trainable))
    if missing or extra:
        raise CheckpointError(
            f"{path} does not hold this run's trainable parameters: {len(missing)} missing "
            f"{missing[:3]}, {len(extra)} not trained here {extra[:3]}; was peft.mode changed?"
        )


def rotate(folder: Path, committed: int, *, keep_last: int, keep_every: int) -> list[Path]:
    """Delete old checkpoints on rank 0 after the commit of a step; return what was deleted.

    The newest ``keep_last`` stay, and those whose step is a multiple of ``keep_every`` (0 = none).
    Checkpoints beyond ``committed`` are the damaged ones that this life walked back over.
    """
    steps = {path: int(path.name.removeprefix("step_")) for path in list_steps(folder)}
    ahead = [path for path, step in steps.items() if step > committed]
    old = [path for path, step in steps.items() if step <= committed][keep_last:]
    deleted = ahead + [p for p in old if not (keep_every and steps[p] % keep_every == 0)]
    for path in deleted:
        _remove(path)
    for leftover in folder.glob(".step_*.tmp"):
        _remove(leftover)
    return deleted


def _remove(path: Path) -> None:
    """Delete a folder; what cannot be deleted now is no reason to stop a run."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        LOG.warning("old checkpoint %s could not be deleted: %s", path, error)


def write_json(path: Path, data: Any) -> None:
    """Write JSON durably: aside, fsync, rename."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(data, ensure_ascii=False, indent=1), encoding="utf-8")
    _fsync(aside)
    aside.rename(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def iterate_whole(reader: Reader) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every saved parameter by name, one at a time, fp32."""
    for name in reader.shapes:
        yield name, reader.read_whole(name)
