"""What a stage gives the training loop: model, batches, loss, learning rate; one optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from trainer import faults, heartbeat
from trainer.config import RunConfig
from trainer.data.batches.collate import Batch
from trainer.engine.collectives import sum_over_ranks
from trainer.engine.engine import Engine
from trainer.metrics.bag import MetricBag
from trainer.metrics.meters import Meters
from trainer.metrics.sinks import Sinks
from trainer.numerics import NumericsGuard
from trainer.signals import StopRequest
from trainer.stage import Context, Stage


class TrainStage(Stage):
    """A stage that trains one engine.

    Attributes:
        policy, bag, guard, meters: set by ``setup``.
    """

    policy: Engine
    bag: MetricBag
    guard: NumericsGuard
    meters: Meters

    def setup(self, context: Context, sinks_step: int) -> Sinks:
        """Build model, engine and data; return the sinks, continued after ``sinks_step``."""
        raise NotImplementedError

    def batches(self, state: dict[str, Any] | None) -> Iterator[Batch]:
        """Yield this rank's micro-batches, from the loader state of a checkpoint."""
        raise NotImplementedError

    def rows_per_step(self, config: RunConfig) -> int:
        """Return the rows of data that one step takes over all ranks."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return the loss SUMMED over the batch's targets."""
        raise NotImplementedError

    def seed(self, batch: Batch) -> None:
        """Set the random numbers of a micro-batch, by its rows alone."""
        raise NotImplementedError

    def num_targets(self, batch: Batch) -> float:
        """Return what the summed loss is to be divided by."""
        raise NotImplementedError

    def lr(self, step: int) -> float:
        """Return the learning rate of step ``step`` (from 0)."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Return what resumes besides the engine, as JSON-able data equal on all ranks."""
        raise NotImplementedError

    def progress(self) -> dict[str, float]:
        """Return how much data the finished steps have seen, to be logged: tokens, epochs, …"""
        raise NotImplementedError

    def evaluate(self, sinks: Sinks, step: int, stop: StopRequest) -> bool:
        """Measure on held-out data and record it; return False if a stop was agreed meanwhile."""
        raise NotImplementedError

    def train_step(self, step: int, batches: Iterator[Batch]) -> int:
        """Do one optimizer step; return the tokens that went through the model on all ranks."""
        faults.reach("step", rank=self.policy.rank, step=step)
        with heartbeat.phase("data"), self.meters.own.timed("data"):
            faults.reach("data", rank=self.policy.rank, step=step)
            window = list(islice(batches, self.policy.grad_accum_steps))
        before = self.bag.mark()
        own = sum(map(self.num_targets, window)), sum(batch.num_tokens for batch in window)
        count, num_tokens = sum_over_ranks(own)
        for batch in window:
            self.seed(batch)
            with self.meters.own.timed("compute", on_device=True):
                loss = self.loss(batch)
            if faults.reach("loss", rank=self.policy.rank, step=step):
                loss = loss * float("nan")
            share = loss / (count or 1.0)
            self.policy.backward(share)
            self.guard.watch(step, batch.sample_ids, share.detach())
            self.policy.step(self.lr(step), judge=self.guard.judge)
            self.bag.add_ratio("loss", loss.detach(), self.num_targets(batch))
        if self.guard.end_step(self.policy.grad_norm(), self.policy.overflowed()):
            self.bag.back_to(before)
        return int(num_tokens)
