"""Stop on NaN and Inf with the step, the rank and the batch that had it."""

from __future__ import annotations

import torch

from trainer.engine.collectives import any_over_ranks, is_distributed
from trainer.errors import NumericsError

REMEDY = (
    "no checkpoint was saved since; lower optim.lr, raise schedule.warmup_steps or lower "
    "optim.grad_clip, and look at the data of this step. A retry would replay it"
)


class FiniteGuard:
    """Remembers losses and gradient norms on the device until somebody looks.

    So no step waits for one. fp16 steps that overflowed were skipped by the loss scaler: what they
    had is forgiven.
    """

    def __init__(self) -> None:
        self._watched: list[tuple[str, torch.Tensor]] = []
        self._this_step: list[tuple[str, torch.Tensor]] = []
        self.num_overflows = 0

    def watch(self, step: int, sample_ids: torch.Tensor, loss: torch.Tensor) -> None:
        """Remember one micro-batch: step from 0, sample_ids [rows], loss []."""
        what = f"loss is not finite at step {step + 1}, rows {sample_ids.tolist()}"
        self._this_step.append((what, torch.isfinite(loss)))

    def end_step(self, step: int, grad_norm: torch.Tensor, overflowed: bool) -> None:
        """Add the gradient norm [] of a step; drop all of it if the scaler skipped the step."""
        if overflowed:
            self.num_overflows += 1
        else:
            what = f"gradient norm is not finite at step {step + 1}"
            self._watched += [*self._this_step, (what, torch.isfinite(grad_norm))]
        self._this_step = []

    def check(self) -> None:
        """Raise on every rank if anything watched on any rank was not finite.

        Raises:
            NumericsError: naming step, rank and batch ids.
        """
        bad = next((what for what, finite in self._watched if not bool(finite)), None)
        self._watched = []
        if not any_over_ranks(bad is not None):
            return
        rank = torch.distributed.get_rank() if is_distributed() else 0
        if bad is None:
            raise NumericsError(f"rank {rank} stops: the loss of another rank is not finite")
        raise NumericsError(f"{bad} on rank {rank}: {REMEDY}")
