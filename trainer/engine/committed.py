"""Committed checkpoints: find the newest complete one, verify it, read parameters by name.

What ``checkpoint.py`` writes, read without DeepSpeed; export and tests use it as training does.
"""

from __future__ import annotations

import itertools
import logging
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from trainer import heartbeat
from trainer.engine import collectives
from trainer.engine.manifest import (
    FORMAT,
    file_problem,
    list_steps,
    list_strangers,
    read_manifest,
)
from trainer.errors import CheckpointError

__all__ = ["FORMAT", "list_steps"]
LOG = logging.getLogger(__name__)
SAVED_DTYPE = torch.float32  # of everything in a checkpoint


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

    @property
    def layout(self) -> str:
        """Return on what it was written."""
        return describe_layout(self.manifest["world_size"], self.manifest["zero_stage"])


def describe_layout(num_ranks: int, zero_stage: int) -> str:
    """Return on how many ranks an engine is split, and how."""
    return f"{num_ranks} rank{'s' * (num_ranks > 1)}, ZeRO-{zero_stage}"


def find_newest(folder: Path, damaged: str = "walk_back") -> Checkpoint | None:
    """Return the newest complete checkpoint, walking back over damaged ones and saying so.

    Rank 0 lists the folder and announces each step, since another node's listing may be stale; all
    ranks share the hashing and agree on the answer.

    Args:
        folder: the run's ``checkpoints`` folder.
        damaged: ``refuse`` to walk back.

    Returns:
        None when the run has never committed one.

    Raises:
        CheckpointError: checkpoints exist and every one is damaged, or the newest is and
            ``damaged`` says so; never silently from scratch.
    """
    reasons = []
    for step in _announce_steps(folder):
        path = folder / f"step_{step:08d}"
        problem = verify(path)
        if not problem:
            return Checkpoint(path, read_manifest(path))
        if damaged == "refuse":
            raise CheckpointError(
                f"loop.damaged=refuse, and the newest checkpoint {path} is damaged ({problem}); "
                "restore it, delete it to go on from the one before, or use loop.damaged=walk_back"
            )
        reasons.append(f"{path.name}: {problem}")
        LOG.warning("checkpoint %s is damaged (%s); walking back", path, problem)
    if reasons:
        raise CheckpointError(
            f"no complete checkpoint in {folder}:\n  " + "\n  ".join(reasons) + "\nRestore one, or "
            "remove the folder to start from the beginning on purpose"
        )
    strangers = list_strangers(folder)
    if collectives.any_over_ranks(bool(strangers)):
        raise CheckpointError(
            f"{folder} holds no checkpoint under its own name, but {', '.join(strangers)} with a "
            "manifest; rename it back to step_ and the eight digits of its step, or move it away "
            "to start from the beginning on purpose"
        )
    return None


def find_checkpoint(folder: Path, step: int | None) -> Checkpoint:
    """Return the newest complete checkpoint, or the one of ``step``, verified.

    Raises:
        CheckpointError: there is none, or that one is missing or damaged.
    """
    if step is None:
        newest = find_newest(folder)
        if newest is None:
            raise CheckpointError(f"{folder} holds no checkpoint yet; let the run save one first")
        return newest
    path = folder / f"step_{step:08d}"
    if problem := verify(path):
        steps = ", ".join(str(int(p.name[5:])) for p in list_steps(folder))
        raise CheckpointError(f"step={step}: {problem}; checkpoints there: {steps or 'none'}")
    return Checkpoint(path, read_manifest(path))


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
        manifest = read_manifest(path)
    except CheckpointError as error:
        return str(error)
    rank, world_size = _rank_and_world()
    for index, (name, facts) in enumerate(sorted(manifest["files"].items())):
        heartbeat.beat()
        problem = file_problem(path / name, facts, read=index % world_size == rank)
        if problem:
            return f"{name} {problem}"
    return ""


def _rank_and_world() -> tuple[int, int]:
    if not collectives.is_distributed():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


class Reader:
    """Reads parameters of a verified checkpoint by name, whole or in part."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.num_bytes = 0  # read so far
        self.shapes: dict[str, list[int]] = checkpoint.manifest["parameters"]
        self._files = [safe_open(checkpoint.path / n, "pt") for n in checkpoint.manifest["files"]]
        self._pieces: dict[str, list[tuple[int, int, int, str]]] = defaultdict(list)
        for number, file in enumerate(self._files):
            for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                tensor_name, offset = key.rsplit("@", 1)
                numel = file.get_slice(key).get_shape()[0]
                self._pieces[tensor_name].append((int(offset), numel, number, key))

    def read_into(
        self, out: torch.Tensor, name: str, kind: str = "master", offset: int = 0
    ) -> None:
        """Fill ``out`` [numel] with elements [offset, offset + numel) of flattened ``name``.

        Straight from the file, whatever device and number format ``out`` has: memory in between
        would cost more than the reading.
        """
        heartbeat.beat()
        filled, numel = 0, out.numel()
        for start, length, number, key in self._pieces[f"{name}|{kind}"]:
            low, high = max(start, offset), min(start + length, offset + numel)
            if low < high:
                piece = self._files[number].get_slice(key)[low - start : high - start]
                out[low - offset : high - offset].copy_(piece)
                filled += high - low
        self.num_bytes += filled * SAVED_DTYPE.itemsize
        if filled != numel:
            raise CheckpointError(
                f"{self.checkpoint.path}: {name} has {filled} of {numel} elements of {kind}"
            )

    def read_whole(self, name: str, kind: str = "master") -> torch.Tensor:
        """Return the whole parameter in its own shape, fp32."""
        whole = torch.empty(self.shapes[name], dtype=SAVED_DTYPE)
        self.read_into(whole.view(-1), name, kind)
        return whole


def iterate_whole(reader: Reader) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every saved parameter by name, one at a time, fp32."""
    for name in reader.shapes:
        yield name, reader.read_whole(name)
