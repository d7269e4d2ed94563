"""What a step learns from its experience: epochs of minibatches, actor and critic in one window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer import faults
from trainer.data.batches.pack import shuffle
from trainer.engine.collectives import any_over_ranks
from trainer.engine.engine import Engine
from trainer.errors import NumericsError
from trainer.losses.ppo import kl_k3, policy_loss, value_loss
from trainer.metrics.bag import MetricBag
from trainer.numerics import NumericsGuard
from trainer.rollout.answer_rows import AnswerBatch, Layout, deal
from trainer.rollout.collection import run_update
from trainer.rollout.experience import Experience

ACTOR = "actor."  # part of the names of the policy's parameters in the engine
# Largest |log ratio| before the first update: rows are packed otherwise than when the responses
# were scored, and sums of low precision then differ in their last bits, most for unlikely tokens.
RATIO_TOLERANCE = {"fp32": 1e-3, "fp16": 0.1, "bf16": 0.5}


@dataclass(frozen=True)
class UpdateConfig:
    """How a step's experience is used."""

    epochs: int = 4  # passes over the experience
    num_minibatches: int = 4  # optimizer steps a pass
    clip_range: float = 0.2  # of the ratio to the policy that wrote the responses
    value_clip_range: float = 0.2  # of a value's move; 0 = any
    value_coef: float = 0.5  # weight of the critic's loss beside the actor's
    entropy_coef: float = 0.0  # bonus for undecided distributions
    critic_warmup_steps: int = 0  # steps that train the critic alone

    def problems(self) -> list[str]:
        """Return values that make no sense."""
        rules = [
            (self.epochs >= 1, "epochs", "1 or more"),
            (self.num_minibatches >= 1, "num_minibatches", "1 or more"),
            (0 < self.clip_range < 1, "clip_range", "more than 0, less than 1"),
            (self.value_clip_range >= 0, "value_clip_range", "0 (off) or more"),
            (self.value_coef > 0, "value_coef", "more than 0"),
            (self.entropy_coef >= 0, "entropy_coef", "0 (off) or more"),
            (self.critic_warmup_steps >= 0, "critic_warmup_steps", "0 or more"),
        ]
        return [
            f"{key}={vars(self)[key]!r}: expected {expected}"
            for good, key, expected in rules
            if not good
        ]


class Update:
    """One step's update.

    Args:
        engine: the run's.
        experience: the same on every rank.
        config: epochs, minibatches, clipping.
        layout: of the rows.
        temperature: of the sampling that wrote the responses.
        loss_kl_coef: price of the divergence from the reference in the loss (GRPO); 0 = none.
        bag: takes the figures.
        guard: takes the losses.
    """

    def __init__(
        self,
        engine: Engine,
        experience: Experience,
        config: UpdateConfig,
        layout: Layout,
        *,
        temperature: float,
        loss_kl_coef: float,
        bag: MetricBag,
        guard: NumericsGuard,
    ) -> None:
        self.engine, self.experience, self.config, self.layout = engine, experience, config, layout
        self._temperature, self._loss_kl_coef = temperature, loss_kl_coef
        self._bag, self._guard = bag, guard
        self._furthest: Tensor | None = None  # |log ratio| of the first minibatch

    def run(self, step: int, lr: float, key: str, *, with_actor: bool) -> None:
        """Do all optimizer steps.

        Args:
            step: of the run, from 0.
            lr: learning rate.
            key: decides the minibatches; name seed and step in it.
            with_actor: False trains the critic alone.

        Raises:
            NumericsError: the policy that learns is not the one that was asked before, or a loss
                or gradient was not finite.
        """
        # A rank may get nothing but batches that fill up, yet all ranks must record the same names.
        nothing = torch.zeros((), device=self.engine.device)
        self._add(0, policy_loss=nothing, clip_fraction=nothing)
        if self.experience.returns is not None:
            self._add(0, value_loss=nothing, value_clip_fraction=nothing)
        for index, minibatch in enumerate(self._minibatches(key)):
            self._furthest = torch.zeros((), device=self.engine.device) if not index else None
            self._optimize(step, lr, minibatch, with_actor)
        self._guard.check()  # before a broken policy is asked to write

    def _minibatches(self, key: str) -> Iterator[list[int]]:
        num = len(self.experience.samples)
        for epoch in range(self.config.epochs):
            order = shuffle(num, f"{key}/{epoch}")
            for part in np.array_split(order, min(self.config.num_minibatches, num)):
                yield part.tolist()

    def _optimize(self, step: int, lr: float, minibatch: list[int], with_actor: bool) -> None:
        """Do one optimizer step.

        Actor and critic share each backward: a window in which some backward does not reach a
        parameter loses gradients under ZeRO-3.
        """
        before = self._bag.mark()
        num_targets = self.experience.num_targets(minibatch)
        batches = list(deal(self.experience.samples, minibatch, self.layout))
        for index, batch in enumerate(batches, 1):
            total = self._loss(batch, with_actor) / num_targets
            if faults.reach("loss", rank=self.engine.rank, step=step):
                total = total * float("nan")
            is_last = index == len(batches)
            self.engine.backward(total, is_last)
            self._guard.watch(step, torch.tensor(batch.samples, dtype=torch.int64), total.detach())
            if is_last:
                self._check_ratio()
            self.engine.step(lr, None if with_actor else ACTOR, self._guard.judge)
        if self._guard.end_step(self.engine.grad_norm(), self.engine.overflowed()):
            self._bag.back_to(before)

    def _loss(self, batch: AnswerBatch, with_actor: bool) -> Tensor:
        """Return the summed loss over a batch's targets."""
        found = run_update(
            self.engine,
            batch,
            self._temperature,
            with_entropy=self.config.entropy_coef > 0,
            with_critic=self.experience.returns is not None,
        )
        if not batch.samples:
            return sum((each.sum() for each in found if each is not None), start=0.0) * 0
        places = self.experience.places(batch.samples)
        loss = self._actor_loss(found.logps, found.entropies, places) * with_actor
        return loss if found.values is None else loss + self._critic_loss(found.values, places)

    def _actor_loss(self, logps: Tensor, entropies: Tensor | None, places: Tensor) -> Tensor:
        """Return the summed loss of the policy, all [n]; the targets are ``places`` of all."""
        figures = self.experience.figures
        old, reference, advantages = (
            values[places].to(logps.device)
            for values in (figures.old_logps, figures.reference_logps, self.experience.advantages)
        )
        loss, num_clipped = policy_loss(logps, old, advantages, self.config.clip_range)
        if self._furthest is not None:
            furthest = (logps.detach() - old).abs().max()
            self._furthest = torch.maximum(self._furthest, furthest)
        if self._loss_kl_coef:
            loss = loss + self._loss_kl_coef * kl_k3(logps, reference).sum()
        if entropies is not None:
            loss = loss - self.config.entropy_coef * entropies.sum()
        self._add(len(places), policy_loss=loss, clip_fraction=num_clipped)
        return loss

    def _critic_loss(self, values: Tensor, places: Tensor) -> Tensor:
        """Return the summed loss of the critic, values [n]; the targets are ``places`` of all."""
        figures = self.experience.figures
        assert figures.values is not None and self.experience.returns is not None
        old, returns = (
            each[places].to(values.device) for each in (figures.values, self.experience.returns)
        )
        loss, num_clipped = value_loss(values, old, returns, self.config.value_clip_range)
        self._add(len(places), value_loss=loss, value_clip_fraction=num_clipped)
        return self.config.value_coef * loss

    def _add(self, num_targets: int, **sums: Tensor) -> None:
        for name, total in sums.items():
            self._bag.add_ratio(name, total.detach(), num_targets)

    def _check_ratio(self) -> None:
        """Compare, before the first update, the policy with the one that the figures are of."""
        if self._furthest is None:
            return
        furthest, limit = float(self._furthest), RATIO_TOLERANCE[self.engine.precision]
        if any_over_ranks(not furthest <= limit):  # NaN as well
            raise NumericsError(
                "before the first update of a step the new policy differs from the old one: "
                f"largest |log ratio| {furthest:.3g} on rank {self.engine.rank}, expected at most "
                f"{limit:g} in {self.engine.precision}. The same weights gave other "
                "log-probabilities: is there dropout left, or a layer whose result depends on the "
                "rows it shares a batch with?"
            )
