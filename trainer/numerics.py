"""What is done about losses and gradients that are not finite, or that leap.

What a step had stays on the device until somebody looks: when figures are logged and before a
checkpoint, so that no step waits for the device. Only where a step is to be skipped the look has to
come before it. All ranks look together and judge by the same numbers.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from trainer.config import GuardConfig
from trainer.engine.collectives import gather_integers, sum_over_ranks
from trainer.engine.judged import Judge
from trainer.errors import NumericsError, RollBackError

SIGMA_PER_MAD = 1.4826  # of a normal distribution
MIN_SPREAD = 0.01  # of the median: what passes for a deviation where there is hardly any
REMEDY = (
    "no checkpoint was saved since; lower optim.lr, raise schedule.warmup_steps or lower "
    "optim.grad_clip, and look at the data of this step. A retry would replay it, unless "
    "guard.non_finite or guard.spikes says what else to do"
)


def is_spike(value: float, history: Sequence[float], factor: float) -> bool:
    """Return whether ``value`` leaps above those before it.

    Args:
        value: of this step.
        history: of the steps before.
        factor: standard deviations above the median, estimated from the median deviation.
    """
    middle = statistics.median(history)
    deviation = statistics.median(abs(one - middle) for one in history)
    spread = max(SIGMA_PER_MAD * deviation, MIN_SPREAD * abs(middle))
    # Half of the steps had exactly 0, as where most prompts of GRPO teach nothing: no scale.
    return spread > 0 and value - middle > factor * spread


@dataclass
class Update:
    """What one optimizer step had on this rank, on the device.

    Attributes:
        step: of the loop, from 0.
        sample_ids: of each micro-batch, [rows].
        losses: of each micro-batch [], its share of the step's loss.
        norm: of the gradient [], over all ranks.
    """

    step: int
    sample_ids: list[torch.Tensor] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    norm: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def rows(self) -> list[int]:
        """Return the ids of its rows."""
        return torch.cat(self.sample_ids).tolist()

    def bad_rows(self) -> list[int]:
        """Return the ids of the rows of micro-batches whose loss is not finite."""
        pairs = zip(self.sample_ids, self.losses, strict=True)
        return [row for ids, loss in pairs if not bool(loss.isfinite()) for row in ids.tolist()]


class Fault(NamedTuple):
    """What is wrong with a step."""

    reason: str
    is_spike: bool = False


class Facts(NamedTuple):
    """What one optimizer step had, over all ranks; what is not finite counts as 0."""

    bad_losses: float  # micro-batches
    loss: float
    bad_norm: float
    norm: float


def measure(updates: Sequence[Update]) -> list[Facts]:
    """Bring what updates had to the host, in one transfer, and sum it over the ranks."""
    if not updates:
        return []
    rows = []
    for update in updates:
        losses = torch.stack(update.losses).double()
        norm = torch.as_tensor(update.norm).to(losses.device, torch.float64).view(1)
        rows.append(torch.cat([_count_and_sum(losses), _count_and_sum(norm)]))
    summed = sum_over_ranks(torch.cat(rows).tolist())
    [num_ranks] = sum_over_ranks([1.0])
    each = (summed[at : at + 4] for at in range(0, len(summed), 4))
    return [Facts(bad, loss, bad_norm, norm / num_ranks) for bad, loss, bad_norm, norm in each]


def _count_and_sum(values: torch.Tensor) -> torch.Tensor:
    """Return how many are not finite, and the sum of the others: [2]."""
    finite = torch.isfinite(values)
    return torch.stack([(~finite).sum().double(), torch.where(finite, values, 0.0).sum()])


class NumericsGuard:
    """Decides on optimizer steps by ``guard.non_finite`` and ``guard.spikes``.

    fp16 steps that overflowed were skipped by the loss scaler: what they had is forgiven.

    Attributes:
        num_overflows: of the run.
        num_skips: of the run.
        num_roll_backs: of the run, up to the checkpoint it goes on from.
        events: skips that are not recorded yet.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.num_overflows = self.num_skips = self.num_roll_backs = 0
        self.events: list[dict[str, Any]] = []
        self._num_seen, self._largest_norm = 0, 0.0
        self._this: Update | None = None
        self._pending: list[Update] = []
        self._trouble: NumericsError | None = None
        self._was_judged = self._was_skipped = False
        self._skipped: deque[int] = deque(maxlen=config.max_skips)
        self._history = {
            what: deque[float](maxlen=config.spike_window) for what in ("loss", "gradient norm")
        }

    @property
    def judge(self) -> Judge | None:
        """What an engine asks before a step; None where no step is ever skipped."""
        return self._judge if "skip" in (self.config.non_finite, self.config.spikes) else None

    def watch(self, step: int, sample_ids: torch.Tensor, loss: torch.Tensor) -> None:
        """Remember one micro-batch: step from 0, sample_ids [rows], its share of the loss []."""
        if self._this is None:
            self._this = Update(step)
        self._this.sample_ids.append(sample_ids)
        self._this.losses.append(loss)

    def _judge(self, norm: torch.Tensor) -> bool:
        """Return whether an optimizer step may be made; what it leads to comes with its end."""
        assert self._this is not None
        self._was_judged, self._this.norm = True, norm
        fault = self._weigh(self._this)
        if fault is None:
            return True
        self._was_skipped = True
        try:
            self._answer(self._this, fault)
        except NumericsError as error:
            self._trouble = error  # raised when DeepSpeed has cleaned up after the step
        return False

    def end_step(self, grad_norm: torch.Tensor, overflowed: bool) -> bool:
        """Add the gradient norm [] of an optimizer step; forget it if the scaler skipped it.

        Returns:
            Whether the guard skipped the step.

        Raises:
            NumericsError: where the step was judged, and the run is not to go on.
        """
        update, was_judged, trouble = self._this, self._was_judged, self._trouble
        assert update is not None
        was_skipped = self._was_skipped
        self._this, self._was_judged, self._trouble, self._was_skipped = None, False, None, False
        if trouble is not None:
            raise trouble
        if overflowed:
            self.num_overflows += 1
        elif not was_judged:
            update.norm = grad_norm
            self._pending.append(update)
        return was_skipped

    def check(self) -> None:
        """Look at the steps since the last look; every rank must call this.

        Raises:
            NumericsError: on every rank, naming step, rank and rows.
        """
        updates, self._pending = self._pending, []
        found = measure(updates)
        norms = [facts.norm for facts in found]
        self._num_seen, self._largest_norm = len(norms), max(norms, default=0.0)
        for update, facts in zip(updates, found, strict=True):
            if fault := self._find_fault(facts):
                self._answer(update, fault)

    def veto(self, step: int, reason: str, sample_ids: Sequence[int]) -> None:
        """Count a step that has nothing finite to learn from as skipped, if such steps are.

        Args:
            step: of the loop, from 0.
            reason: why, the same on every rank.
            sample_ids: of this rank.

        Raises:
            NumericsError: the run is not to go on.
        """
        ids = torch.tensor(list(sample_ids), dtype=torch.int64)
        self._answer(Update(step, [ids], [torch.zeros(())]), Fault(reason))

    def take_events(self) -> list[dict[str, Any]]:
        """Return the skips that nobody has recorded yet."""
        events, self.events = self.events, []
        return events

    def counts(self) -> dict[str, float]:
        """Return figures to log: skips of the run, largest norm of several steps looked at."""
        found = {"num_skips": float(self.num_skips)} if self.num_skips else {}
        if self._num_seen > 1:
            found["largest_grad_norm"] = self._largest_norm
        return found

    def state(self) -> dict[str, Any]:
        """Return what resumes, as JSON-able data equal on all ranks."""
        return {
            "num_skips": self.num_skips,
            "num_roll_backs": self.num_roll_backs,
            "skipped": list(self._skipped),
            "history": {what: list(values) for what, values in self._history.items()},
        }

    def load(self, state: dict[str, Any], num_overflows: int) -> None:
        """Go on where a checkpoint's state was; what was not looked at yet is forgotten."""
        self.num_overflows, self.num_skips = num_overflows, state.get("num_skips", 0)
        self.num_roll_backs = state.get("num_roll_backs", 0)
        self._this, self._pending, self.events = None, [], []
        self._skipped = deque(state.get("skipped", ()), maxlen=self.config.max_skips)
        for what, values in state.get("history", {}).items():
            self._history[what] = deque(values, maxlen=self.config.spike_window)

    def _weigh(self, update: Update) -> Fault | None:
        """Look at one step at once."""
        [facts] = measure([update])
        return self._find_fault(facts)

    def _find_fault(self, facts: Facts) -> Fault | None:
        """Return what is wrong with a step; if nothing is, the next ones are compared with it."""
        if facts.bad_losses:
            return Fault("loss is not finite")
        if facts.bad_norm:
            return Fault("gradient norm is not finite")
        if self.config.spikes == "off":
            return None
        values = {"loss": facts.loss, "gradient norm": facts.norm}
        for what, value in values.items():
            history = self._history[what]
            is_long = len(history) == self.config.spike_window
            if is_long and is_spike(value, history, self.config.spike_factor):
                middle = statistics.median(history)
                return Fault(f"{what} {value:.4g} leaps from a median of {middle:.4g}", True)
        for what, value in values.items():
            self._history[what].append(value)
        return None

    def _answer(self, update: Update, fault: Fault) -> None:
        """Do what the config says of such a step: count it as skipped, or raise."""
        action = str(self.config.spikes if fault.is_spike else self.config.non_finite)
        message = f"{fault.reason} at step {update.step + 1}"
        for rank, rows in enumerate(gather_integers(update.bad_rows())):
            message += f", rows {rows} on rank {rank}" if rows else ""
        if action == "skip" and self._may_skip(update.step):
            self.num_skips += 1
            self._skipped.append(update.step)
            rows_by_rank = gather_integers(update.rows())
            self.events.append({"skipped": update.step + 1, "why": message, "rows": rows_by_rank})
            return
        if action == "skip":
            action = "roll_back" if self.config.max_roll_backs else "stop"
            message += (
                f" (guard.max_skips={self.config.max_skips} in guard.skip_window="
                f"{self.config.skip_window} steps are used up)"
            )
        if action == "roll_back":
            raise RollBackError(f"{message}: {REMEDY}", update.step)
        raise NumericsError(f"{message}: {REMEDY}")

    def _may_skip(self, step: int) -> bool:
        """Return whether fewer steps than may be were skipped within the window before."""
        recent = [one for one in self._skipped if one > step - self.config.skip_window]
        return len(recent) < self.config.max_skips
