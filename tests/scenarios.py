"""Run training scenarios one after another as one rank; started by the tests, not collected.

``python scenarios.py FILE``: FILE holds a JSON list of {"config": …, "explode": bool, "kill_at":
step}. ``explode`` feeds every packed row as padded rows of its pieces; ``kill_at`` ends this very
process with SIGKILL in the middle of that step on the last rank, ``kill_in`` says in which function
of PPO; ``rollout`` answers prompts before every step; ``read`` names a file to which each rank
appends what it reads: step, rank, and number, source and checksum of every row.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_engine import Countdown

from launch.__main__ import leave
from launch.agreement import part
from trainer.config import build, load_config
from trainer.data.batches.collate import Batch, Example, Row, collate
from trainer.engine import checkpoint
from trainer.engine.engine import init_distributed
from trainer.engine.pending_save import PendingSave
from trainer.errors import KuroshioError
from trainer.metrics.sinks import Sinks
from trainer.rollout import collection
from trainer.rollout.generate import generate, rollout_model
from trainer.rollout.sampling import Sampling, draw_uniforms
from trainer.signals import StopRequest
from trainer.stage import Context
from trainer.stages import stage_class
from trainer.store_stage import StoreStage


def explode(batch: Batch) -> Batch:
    """Return the pieces of packed rows as rows of their own, padded to the longest."""
    rows = []
    examples = list_examples(batch)
    for number, lengths in enumerate(batch.piece_lengths):
        at = 0
        for length in lengths:
            ids = batch.input_ids[number, at : at + length].numpy()
            weights = batch.weights
            own = None if weights is None else [weights[number, at : at + length].numpy()]
            what = [examples.popleft()] if batch.examples else None
            rows.append(Row([ids], int(batch.sample_ids[number]), 0, own, what))
            at += length
    return collate(rows, length=None, pad_token_id=0, isolate=True)


def list_examples(batch: Batch) -> deque[Example]:
    """Return what the pieces of a batch of preferences are."""
    found = batch.examples
    if found is None:
        return deque()
    columns = (found.pairs, found.sides, found.documents, found.margins)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return deque(Example((pair, 0), *rest) for pair, *rest in rows)


class Twisted(StoreStage):
    """What is put before a stage's own methods: the scenario's twist."""

    twist: dict[str, Any] = {}  # noqa: RUF012

    def batches(self, state: dict[str, Any] | None) -> Iterator[Batch]:
        batches = super().batches(state)
        if "read" in self.twist:
            batches = map(self.note, batches)
        return map(explode, batches) if self.twist.get("explode") else batches

    def note(self, batch: Any) -> Any:
        """Write down which rows a batch holds, and of PPO which prompts a step answers."""
        if isinstance(batch, Batch):
            rows = [
                [int(number), int(source), zlib.crc32(np.array(ids[: sum(lengths)]).tobytes())]
                for number, source, ids, lengths in zip(
                    batch.sample_ids, batch.source_ids, batch.input_ids, batch.piece_lengths,
                    strict=True,
                )
            ]  # fmt: skip
        else:  # the same on every rank
            own = batch if self.context.rank == 0 else []
            rows = [[0, 0, zlib.crc32(np.array(prompt.ids).tobytes())] for prompt in own]
        line = json.dumps({"step": self._step, "rank": self.context.rank, "rows": rows})
        with Path(self.twist["read"]).open("a") as file:
            file.write(line + "\n")
        return batch

    def loss(self, batch: Batch) -> torch.Tensor:
        last = self.context.rank == self.context.world_size - 1
        if self._step == self.twist.get("kill_at") and last:
            wait_for_saves(self.context.run_dir)
            os.kill(os.getpid(), signal.SIGKILL)
        if self._step == self.twist.get("nan_at") and last:
            return super().loss(batch) * float("nan")
        loss = super().loss(batch)
        if self.twist.get("nan_row") in batch.sample_ids.tolist():
            return loss * float("nan")
        if self._step == self.twist.get("spike_at") and last:
            return loss * 100
        if self._step == self.twist.get("nan_gradient_at") and last:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        if self._step == self.twist.get("overflow_at") and last:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    _step = -1

    def evaluate(self, sinks: Sinks, step: int, stop: StopRequest) -> bool:
        if step == self.twist.get("signal_in_evaluation") and self.context.rank == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().evaluate(sinks, step, stop)

    def setup(self, context: Context, sinks_step: int) -> Sinks:
        if self.twist.get("signal_at_start") and context.rank == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().setup(context, sinks_step)

    def train_step(self, step: int, batches: Iterator[Batch]) -> int:
        self._step = step
        if step == self.twist.get("signal_at") and self.context.rank == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        if self.twist.get("rollout"):
            self.rollout(step)
        last = self.context.rank == self.context.world_size - 1
        if step == self.twist.get("kill_at") and "kill_in" in self.twist and last:
            self.die_in(self.twist["kill_in"])
        if step == self.twist.get("no_update_at"):
            list(islice(batches, self.policy.grad_accum_steps))
            return 0
        with contextlib.ExitStack() as stack:
            if step == self.twist.get("nan_values_at"):
                stack.enter_context(broken_values())
            count = super().train_step(step, batches)
        if step == self.twist.get("flip_at") and last:
            flip_bit(self.policy.module, self.twist["flip_in"])
        self._step = -1
        return count

    def die_in(self, function: str) -> None:
        """Make this step of PPO end with SIGKILL: in its rollout, or after a part of its update."""
        calls = 0
        wait_for_saves(self.context.run_dir)

        def call_or_die(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            result = call(*args, **kwargs)
            if calls == (3 if function == "backward" else 1):
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        place = self.policy if function == "backward" else collection
        setattr(place, function, partial(call_or_die, getattr(place, function)))

    def rollout(self, step: int) -> None:
        """Answer prompts, more of them on rank 0; then leave a second rollout by an error."""
        prompts = [[3 + step, 4, 5], [6] * 9, [7, 8], [9, 10]][: 4 - 2 * self.context.rank]
        uniforms = draw_uniforms(0, step, range(len(prompts)), 12)
        with rollout_model(self.policy, self.policy.module) as model:
            assert not any(module.training for module in model.modules())
            greedy = generate(model, prompts, Sampling(12, 0.0), [2], uniforms)
            drawn = generate(model, prompts, Sampling(12, 1.0), [2], uniforms)
        with contextlib.suppress(KeyError), rollout_model(self.policy, self.policy.module):
            raise KeyError
        assert self.policy.module.training
        with (self.context.run_dir / f"answers_{self.context.rank}.jsonl").open("a") as file:
            file.write(json.dumps([response.ids for response in greedy + drawn]) + "\n")


def flip_bit(module: torch.nn.Module, name: str) -> None:
    """Flip the lowest bit of a parameter's first number, as a failing memory would."""
    flat = module.get_parameter(name).data.view(-1)
    width = {2: torch.int16, 4: torch.int32}[flat.element_size()]
    flat.view(width)[0] ^= 1


@contextlib.contextmanager
def broken_values() -> Iterator[None]:
    """Let a critic say NaN of one token."""
    figures = collection.Collector.figures

    def break_one(self: collection.Collector, *args: Any, **kwargs: Any) -> Any:
        found = figures(self, *args, **kwargs)
        assert found.values is not None
        found.values[0] = float("nan")
        return found

    collection.Collector.figures = break_one
    try:
        yield
    finally:
        collection.Collector.figures = figures


@contextlib.contextmanager
def expecting(error: str | None) -> Iterator[None]:
    """Go on after the error that a scenario says it ends with, and say what it said."""
    try:
        yield
    except KuroshioError as found:
        if type(found).__name__ != error:
            raise
        print(f"expected: {found}", flush=True)
    else:
        assert error is None, f"no {error}"


def wait_for_saves(run_dir: Path) -> None:
    """Let saves that go on beside training be committed: a kill in a step is to be none in a save.

    A rank that is killed has written its own part of them, or rank 0 would never be done.
    """
    limit = time.monotonic() + 60
    while list((run_dir / "checkpoints").glob(".step_*.tmp")) and time.monotonic() < limit:
        time.sleep(0.01)


def kill_at_byte(step: int, rank: int, at: int) -> None:
    """Make a rank's part of a save end with SIGKILL before it changed so many bytes and names."""
    write = PendingSave.write

    def write_or_die(self: PendingSave) -> None:
        if (self.draft.step, self.draft.rank) == (step, rank):
            Countdown(at).install()
        write(self)

    PendingSave.write = write_or_die


def kill_between_renames() -> None:
    """Make a save die when the old folder of its step is aside and the new one not yet there."""
    rename = Path.rename

    def rename_or_die(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp") and self.name.startswith(".step_"):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    Path.rename = rename_or_die


def kill_in_save(step: int) -> None:
    """Make the save of ``step`` end with SIGKILL after all files are written, before the rename."""
    commit = checkpoint._commit

    def commit_or_die(aside: Path, final: Path, manifest: dict[str, Any], *more: Any) -> None:
        if manifest["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        commit(aside, final, manifest, *more)

    checkpoint._commit = commit_or_die


def split_everything() -> None:
    """Make ZeRO-3 split also the small parameters that it would keep whole on every rank."""
    from trainer import model_parts

    make = model_parts.make_ds_config

    def make_without_threshold(*args: Any, **kwargs: Any) -> dict[str, Any]:
        config = make(*args, **kwargs)
        if config["zero_optimization"]["stage"] == 3:
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config

    model_parts.make_ds_config = make_without_threshold


def main(path: str) -> None:
    if "fp16" in Path(path).read_text():  # torch computes it on a CPU; DeepSpeed refuses to try
        from deepspeed.accelerator import get_accelerator

        type(get_accelerator()).is_fp16_supported = lambda self: True
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ["LOCAL_RANK"])
    logging.basicConfig(level=logging.WARNING)
    init_distributed(local_rank, 300)
    if "split_everything" in Path(path).read_text():
        split_everything()
    for scenario in json.loads(Path(path).read_text()):
        if "kill_in_save" in scenario:
            kill_in_save(scenario["kill_in_save"])
        if "kill_at_byte" in scenario:
            kill_at_byte(**scenario["kill_at_byte"])
        if scenario.get("kill_between_renames"):
            kill_between_renames()
        config = load_config(scenario["config"])
        fields = {key: value for key, value in config.stage.items() if key != "name"}
        # A dataclass made the stage's own __init__; the twist stands before it.
        twisted = type("Scenario", (Twisted, stage_class(config.stage["name"])), {})
        stage = build(twisted, fields, "stage", problems := [])
        assert not problems, problems
        stage.twist = scenario
        config, _ = stage.settle(config)
        run_dir = Path(config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        with expecting(scenario.get("expect")):
            stage.run(Context(config, run_dir, rank, world_size, local_rank))
    part()
    leave(0)  # as a run does


if __name__ == "__main__":
    main(sys.argv[1])
