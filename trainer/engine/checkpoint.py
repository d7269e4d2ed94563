"""Checkpoints by parameter name: safetensors and JSON, committed by a rename.

``checkpoints/step_00000040/`` holds ``manifest.json`` (state, sizes, SHA-256 of every file) and
one ``rank_00000.safetensors`` per rank with that rank's fragments: ``name|master@offset`` and so
on, 1-D fp32. Frozen weights are not written. Nothing depends on ZeRO stage, offload or world size.

This module knows what a checkpoint is made of and reads it back; ``saver.py`` says when.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.disk import nearest_existing, sync_path
from trainer.engine import collectives
from trainer.engine.committed import Checkpoint, Reader
from trainer.engine.fragments import get_adam_step, set_adam_step
from trainer.engine.manifest import FORMAT, MANIFEST_NAME
from trainer.engine.precision import load_scaler_state, scaler_state
from trainer.engine.shard_file import write_json
from trainer.errors import CheckpointError, LeaseError, StorageError
from trainer.faults import reach
from trainer.lease import Lease
from trainer.lives import BEGUN_NAME, utc_now

if TYPE_CHECKING:  # exporting reads checkpoints without DeepSpeed
    from trainer.engine.engine import Engine

BYTES_PER_WEIGHT = 12  # fp32 master and two moments


def shard_name(rank: int) -> str:
    """Return the name of a rank's shard."""
    return f"rank_{rank:05d}.safetensors"


def iterate_tensors(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield this rank's tensors [numel] by key, each valid until the next is asked for."""
    for fragment in engine.fragments():
        for kind, view in fragment.tensors().items():
            yield f"{fragment.name}|{kind}@{fragment.offset}", view


def describe_shapes(engine: Engine) -> dict[str, list[int]]:
    """Return the whole shapes of the trained parameters."""
    return {
        name: list(vars(param).get("ds_shape", param.shape))
        for name, param in engine.trainable().items()
    }


@dataclass(frozen=True)
class Draft:
    """A checkpoint that is being written, and what of its manifest is known before its files.

    Attributes:
        folder: the run's ``checkpoints`` folder.
        rank: of this process.
        manifest: without ``files``; rank 0's is written.
        lease: the right to write there; None where nobody else can.
    """

    folder: Path
    rank: int
    manifest: dict[str, Any]
    lease: Lease | None = None

    @property
    def step(self) -> int:
        """Return the optimizer steps done."""
        return int(self.manifest["step"])

    @property
    def aside(self) -> Path:
        """Return where it is written; a life's own name, as ranks of an older one may write it."""
        life = f".life_{self.lease.token}" if self.lease else ""
        return self.folder / f".step_{self.step:08d}{life}.tmp"

    @property
    def final(self) -> Path:
        """Return where it counts."""
        return self.folder / f"step_{self.step:08d}"

    @property
    def shard(self) -> Path:
        """Return this rank's file."""
        return self.aside / shard_name(self.rank)


def draft_checkpoint(
    engine: Engine, folder: Path, step: int, state: dict[str, Any], lease: Lease | None = None
) -> Draft:
    """Return the draft of a checkpoint of this moment.

    Args:
        engine: the trained engine.
        folder: the run's ``checkpoints`` folder.
        step: optimizer steps done.
        state: what else resumes (JSON-able).
        lease: the right to write there; None where nobody else can.
    """
    scaler = scaler_state(engine.optimizer) if engine.precision == "fp16" else {}
    state = {"adam_step": get_adam_step(engine.optimizer), "scaler": scaler, **state}
    manifest = {
        "format": FORMAT,
        "step": step,
        "world_size": engine.world_size,
        "zero_stage": engine.config.zero_stage,
        "precision": engine.precision,
        "parameters": dict(sorted(describe_shapes(engine).items())),
        "state": json.loads(json.dumps(state)),  # a copy: the stage goes on changing its own
    }
    return Draft(folder, engine.rank, manifest, lease)


def begin(draft: Draft, stop: str) -> None:
    """Make the folder that takes the ranks' files, on rank 0; check the lease on every rank.

    Args:
        draft: what is saved.
        stop: what asked for a save at the end of this life, empty for a save of the rhythm.
    """
    if draft.lease:
        draft.lease.check()
    if draft.rank != 0:
        return
    shutil.rmtree(draft.aside, ignore_errors=True)
    draft.aside.mkdir(parents=True)
    note = {"step": draft.step, "stop": stop, "begun": utc_now()}
    (draft.aside / BEGUN_NAME).write_text(json.dumps(note))


def finish_shard(draft: Draft, facts: dict[str, Any]) -> None:
    """Say that this rank's file is whole: a side file with its size and hash.

    It is for rank 0 and gone with the commit, so it need not outlive a loss of power.
    """
    write_json(draft.shard.with_suffix(".json"), facts, sync=False)


def missing_ranks(draft: Draft) -> list[int]:
    """Return the ranks that have not said so yet."""
    # A listing, since a name that was asked for too early may stay cached as absent.
    names = {path.name for path in draft.aside.iterdir()}
    ranks = range(draft.manifest["world_size"])
    return [rank for rank in ranks if Path(shard_name(rank)).with_suffix(".json").name not in names]


def commit(draft: Draft) -> None:
    """Make a checkpoint count whose ranks have all finished; rank 0's work.

    Raises:
        LeaseError: a newer life owns the folder; nothing in it is touched.
    """
    files = {}
    for rank in range(draft.manifest["world_size"]):
        side_file = draft.aside / Path(shard_name(rank)).with_suffix(".json")
        files[shard_name(rank)] = json.loads(side_file.read_text())
    _commit(draft.aside, draft.final, {**draft.manifest, "files": files}, draft.lease)


def _commit(aside: Path, final: Path, manifest: dict[str, Any], lease: Lease | None) -> None:
    """Write the manifest last, then rename once."""
    reach("commit", step=manifest["step"])
    write_json(aside / MANIFEST_NAME, manifest)
    for extra in (*aside.glob("rank_*.json"), aside / BEGUN_NAME):
        extra.unlink(missing_ok=True)
    sync_path(aside)
    old = final.with_name(f".{final.name}.old")
    if lease:
        lease.check()
    if final.exists():  # the same step saved again: there is one of the two at every moment
        final.rename(old)
    aside.rename(final)
    sync_path(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def together(work: Callable[[], object], draft: Draft) -> None:
    """Do ``work`` on this rank; if it failed on any, clean up and raise on all."""
    failure: Exception | None = None
    try:
        work()
    except (OSError, LeaseError) as error:
        failure = error
    raise_together(failure, draft)


def raise_together(failure: Exception | None, draft: Draft) -> None:
    """Raise on every rank if any has a failure; what was written of the draft is deleted.

    Raises:
        StorageError: disk full, quota reached or the like; nothing committed before is touched.
        LeaseError: a newer life owns the folder; nothing there is touched.
    """
    if not collectives.any_over_ranks(failure is not None):
        return
    message = storage_message(draft.folder, failure)
    shutil.rmtree(draft.aside, ignore_errors=True)
    if draft.lease:
        draft.lease.check()  # also on the ranks that did not look
    if failure is not None and not isinstance(failure, OSError):
        raise failure
    raise StorageError(message) from failure


def storage_message(folder: Path, failure: Exception | None) -> str:
    """Return what a user reads of a checkpoint that could not be written."""
    if failure is None:
        return f"checkpoint in {folder} was not saved: another rank could not write its part"
    room = os.statvfs(nearest_existing(Path(getattr(failure, "filename", None) or folder)))
    full = isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT)
    cause = "disk full or quota reached" if full else type(failure).__name__
    inodes = f", {room.f_favail} files" if room.f_files else ""
    return (
        f"checkpoint in {folder} was not saved: {cause}: {failure} "
        f"({room.f_bavail * room.f_frsize / 1e6:.1f} MB{inodes} free). Earlier checkpoints are "
        "intact; free space, or lower loop.keep_last or set loop.keep_gb, then start the same "
        "command"
    )


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
            reader.read_into(view, fragment.name, kind, fragment.offset)
    for name, param in trainable.items():
        engine.set_low_precision(param, name, reader)
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
