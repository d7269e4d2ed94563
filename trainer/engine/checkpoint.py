"""Checkpoints by parameter name: safetensors and JSON, committed by a rename.

``checkpoints/step_00000040/`` holds ``manifest.json`` (state, sizes, SHA-256 of every file) and
one ``rank_00000.safetensors`` per rank with that rank's fragments: ``name|master@offset`` and so
on, 1-D fp32. Frozen weights are not written. Nothing depends on ZeRO stage, offload or world size.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from trainer.engine import collectives
from trainer.engine.committed import FORMAT, Checkpoint, Reader, hash_file, list_steps
from trainer.engine.fragments import get_adam_step, set_adam_step
from trainer.engine.precision import load_scaler_state, scaler_state
from trainer.errors import CheckpointError, LeaseError, StorageError
from trainer.lease import Lease

if TYPE_CHECKING:  # exporting reads checkpoints without DeepSpeed
    from trainer.engine.engine import Engine

LOG = logging.getLogger(__name__)


def save(
    engine: Engine, folder: Path, step: int, state: dict[str, Any], lease: Lease | None = None
) -> Path:
    """Write a checkpoint on every rank and commit it.

    Args:
        engine: the trained engine.
        folder: the run's ``checkpoints`` folder.
        step: optimizer steps done.
        state: what else resumes (JSON-able; rank 0's is written).
        lease: the right to write there; None where nobody else can.

    Returns:
        The committed folder.

    Raises:
        StorageError: disk full or quota reached; nothing committed before is touched.
        LeaseError: a newer life owns the folder; nothing is touched.
    """
    # A life's own name: ranks of an older one may be writing the same step.
    life = f".life_{lease.token}" if lease else ""
    aside, final = folder / f".step_{step:08d}{life}.tmp", folder / f"step_{step:08d}"
    scaler = scaler_state(engine.optimizer) if engine.precision == "fp16" else {}
    state = {"adam_step": get_adam_step(engine.optimizer), "scaler": scaler, **state}
    _together(lambda: _start(aside, engine.rank == 0, lease), folder, aside)
    _together(lambda: _write_rank(engine, aside), folder, aside)

    def commit() -> None:
        if engine.rank == 0:
            _commit(aside, final, _describe(engine, aside, step, state), lease)

    _together(commit, folder, aside)
    return final


def _together(work: Any, folder: Path, aside: Path) -> None:
    """Run ``work`` on this rank; if it failed on any, clean up and raise on all."""
    failure: Exception | None = None
    try:
        work()
    except (OSError, SafetensorError, LeaseError) as error:
        failure = error
    if not collectives.any_over_ranks(failure is not None):
        return
    shutil.rmtree(aside, ignore_errors=True)
    if isinstance(failure, LeaseError):
        raise failure
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


def _start(aside: Path, is_main: bool, lease: Lease | None) -> None:
    if lease:
        lease.check()
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
    facts = {"bytes": path.stat().st_size, "sha256": hash_file(path), "shapes": shapes}
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


def _commit(aside: Path, final: Path, manifest: dict[str, Any], lease: Lease | None) -> None:
    """Make the checkpoint count: manifest last, then one rename."""
    write_json(aside / "manifest.json", manifest)
    for side_file in aside.glob("rank_*.json"):
        side_file.unlink()
    _fsync(aside)
    old = final.with_name(f".{final.name}.old")
    if lease:
        lease.check()
    if final.exists():  # the same step saved again: there is one of the two at every moment
        final.rename(old)
    aside.rename(final)
    _fsync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def load(engine: Engine, checkpoint: Checkpoint) -> int:
    """Restore masters, moments, counters and the model's own weights from a checkpoint.

    Returns:
        The bytes that this rank read.

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
    if engine.precision == "fp16":
        load_scaler_state(engine.optimizer, checkpoint.state["scaler"])
    return reader.num_bytes


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
