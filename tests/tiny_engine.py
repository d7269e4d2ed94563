"""An engine of a few numbers without DeepSpeed, for tests of what saving does to files."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch

from trainer.config import LoopConfig
from trainer.engine import checkpoint, shard_file
from trainer.engine.committed import Reader, find_newest
from trainer.engine.fragments import Fragment, iterate_fragments
from trainer.engine.saver import Saver


class TinyEngine:
    """Two parameters trained by AdamW, as much of ``Engine`` as saving and loading read."""

    def __init__(self, numel: int = 3000, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size, self.precision = rank, world_size, "fp32"
        self.config, self.device = SimpleNamespace(zero_stage=0), torch.device("cpu")
        torch.manual_seed(0)
        self.params = {
            "layer.weight": torch.nn.Parameter(torch.randn(numel // 3, 3)),
            "layer.bias": torch.nn.Parameter(torch.randn(7)),
        }
        self.optimizer = torch.optim.AdamW(self.params.values(), fused=True)

    def step(self) -> None:
        """Change every number that a checkpoint holds."""
        for param in self.params.values():
            param.grad = param.detach() * 0.1 + 1
        self.optimizer.step()

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return self.params

    def fragments(self, *, write: bool = False) -> Iterator[Fragment]:
        names = {id(param): name for name, param in self.params.items()}
        place = (self.rank, self.world_size)
        return iterate_fragments(self.optimizer, names, *place, write=write)

    def set_low_precision(self, param: torch.nn.Parameter, name: str, reader: Reader) -> None:
        reader.read_into(param.data.view(-1), name)

    def masters(self) -> dict[str, torch.Tensor]:
        """Return copies of the weights."""
        return {name: param.detach().clone() for name, param in self.params.items()}


def save(engine: TinyEngine, folder: Path, step: int, **loop: Any) -> None:
    """Save a step and wait for it."""
    with Saver(engine, folder, LoopConfig(**loop)) as saver:  # type: ignore[arg-type]
        saver.begin(step, {"evaluated": True})


def save_steps(folder: Path, steps: list[int], **loop: Any) -> dict[int, dict[str, torch.Tensor]]:
    """Train, and save at some steps; return the weights of each."""
    engine, weights = TinyEngine(), {}
    for step in range(1, max(steps) + 1):
        engine.step()
        if step in steps:
            save(engine, folder, step, **{"keep_last": 9, **loop})
            weights[step] = engine.masters()
    return weights


def loaded_weights(folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Load the newest checkpoint into a fresh engine; return its step and the weights."""
    newest = find_newest(folder)
    assert newest is not None
    engine = TinyEngine()
    checkpoint.load(engine, newest)  # type: ignore[arg-type]
    return newest.step, engine.masters()


class Countdown:
    """Counts what a save does to the file system: every byte written, every other change.

    Args:
        at: kill this process just before so many were done; None: count only.
    """

    def __init__(self, at: int | None = None) -> None:
        self.done, self._at = 0, at
        self._write = shard_file._write_all

    def install(self) -> None:
        """Count, in this process, from now on."""
        shard_file._write_all = self.write
        for owner, name in ((Path, "rename"), (Path, "unlink"), (os, "fsync")):
            setattr(owner, name, self.counted(getattr(owner, name)))

    def write(self, file: BinaryIO, piece: memoryview) -> None:
        if self._at is not None and self.done + len(piece) > self._at:
            self._write(file, piece[: self._at - self.done])
            os.kill(os.getpid(), signal.SIGKILL)
        self._write(file, piece)
        self.done += len(piece)

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            if self.done == self._at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.done += 1
            return call(*args, **kwargs)

        return count
