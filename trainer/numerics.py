"""Stop on NaN and Inf with the step, the rank and the batch that had it."""

from __future__ import annotations

import math

import torch

from trainer.engine.collectives import any_over_ranks, is_distributed
from trainer.errors import NumericsError


class FiniteGuard:
    """Remembers losses on the device until somebody looks, so that no step waits for one.

    fp16 steps that overflowed were skipped by the loss scaler: their losses are forgiven.
    """

    def __init__(self) -> None:
        self._watched: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._this_step: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.num_overflows = 0

    def watch(self, step: int, sample_ids: torch.Tensor, loss: torch.Tensor) -> None:
        """Remember one micro-batch: step from 0, sample_ids [rows], loss []."""
        self._this_step.append((step, sample_ids, torch.isfinite(loss)))

    def end_step(self, overflowed: bool) -> None:
        """Keep or, after a skipped fp16 step, drop what the step watched."""
        if overflowed:
            self.num_overflows += 1
        else:
            self._watched += self._this_step
        self._this_step = []

    def check(self, loss: float, grad_norm: float) -> None:
        """Raise if a logged figure or a watched loss is not finite (on all ranks alike).

        Raises:
            NumericsError: naming step, rank and batch ids.
        """
        forgiven = not self._watched  # every step since the last look was a skipped one
        if not forgiven and math.isfinite(loss) and not math.isfinite(grad_norm):
            raise NumericsError(
                f"gradient norm is {grad_norm} after step {self._watched[-1][0] + 1}: "
                + self._remedy()
            )
        self.check_weights()

    def check_weights(self) -> None:
        """Raise on every rank if any watched loss on any rank was not finite."""
        bad = next(((s, ids) for s, ids, finite in self._watched if not bool(finite)), None)
        self._watched = []
        if not any_over_ranks(bad is not None):
            return
        rank = torch.distributed.get_rank() if is_distributed() else 0
        if bad is None:
            raise NumericsError(f"rank {rank} stops: the loss of another rank is not finite")
        raise NumericsError(
            f"loss is not finite at step {bad[0] + 1} on rank {rank}, rows {bad[1].tolist()}: "
            + self._remedy()
        )

    @staticmethod
    def _remedy() -> str:
        return (
            "nothing was saved since; lower optim.lr, raise schedule.warmup_steps or lower "
            "optim.grad_clip, and look at these rows. A retry would replay it"
        )
