"""Committed checkpoints: find the newest complete one, verify it, read parameters by name.

What ``checkpoint.py`` writes, read without DeepSpeed; export and tests use it as training does.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from trainer.engine import collectives
from trainer.errors import CheckpointError

LOG = logging.getLogger(__name__)
FORMAT = 1


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
    return Checkpoint(path, json.loads((path / "manifest.json").read_text()))


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
    if read and hash_file(file) != facts["sha256"]:
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


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def iterate_whole(reader: Reader) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every saved parameter by name, one at a time, fp32."""
    for name in reader.shapes:
        yield name, reader.read_whole(name)
