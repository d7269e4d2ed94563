"""Number formats: what a device computes natively, and fp16's loss scale. Free of DeepSpeed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from trainer.errors import NumericsError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter")  # the state of a loss scale
MAX_OVERFLOWS = 8  # in a row at the smallest loss scale: nothing is expected of the next step


def native_precision() -> str:
    """Return ``bf16`` where it is computed natively, else ``fp16`` on a GPU, ``fp32`` on a CPU."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def scaler_state(optimizer: Any) -> dict[str, float]:
    """Return the loss-scale state of one of DeepSpeed's fp16 optimizers as numbers."""
    scaler = _find_scaler(optimizer)
    return {key: vars(scaler)[key] for key in SCALER_KEYS}


def load_scaler_state(optimizer: Any, state: dict[str, float]) -> None:
    """Restore what ``scaler_state`` returned; an empty state changes nothing."""
    scaler = _find_scaler(optimizer)
    for key, value in state.items():
        setattr(scaler, key, value)


def _find_scaler(optimizer: Any) -> Any:
    own = vars(optimizer)
    return own["loss_scaler"] if "loss_scaler" in own else own["loss_scale_config"]


class LossScale:
    """Watches fp16's loss scale: at its minimum, steps that go on to overflow learn nothing.

    Args:
        optimizer: one of DeepSpeed's fp16 optimizers.
        minimum: of the scale.
    """

    def __init__(self, optimizer: Any, minimum: float) -> None:
        self._minimum, self._num_overflows, self._optimizer = minimum, 0, optimizer
        self._scales: deque[float] = deque(maxlen=2 * MAX_OVERFLOWS)
        own = vars(_find_scaler(optimizer))
        if "raise_error_at_min_scale" in own:  # at the first overflow, without a word on the run
            own["raise_error_at_min_scale"] = False

    def stepping(self, step: Callable[[], None]) -> Callable[[], None]:
        """Return ``step`` with the scale changed after it.

        DeepSpeed (0.19.8) grows the scale within the step and then divides gradients that were
        multiplied by the old one: they, and the moments, would be halved.
        """

        def step_before_scaling() -> None:
            overflows: list[bool] = []
            self._optimizer._update_scale = overflows.append
            try:
                step()
            finally:
                del self._optimizer._update_scale
            for overflow in overflows:
                self._optimizer._update_scale(overflow)

        return step_before_scaling

    def end_step(self, overflowed: bool, scale: float) -> None:
        """Note how a step ended, and the scale after it.

        Raises:
            NumericsError: ``MAX_OVERFLOWS`` steps in a row overflowed at the smallest scale.
        """
        self._scales.append(scale)
        at_minimum = overflowed and scale <= self._minimum
        self._num_overflows = self._num_overflows + 1 if at_minimum else 0
        if self._num_overflows >= MAX_OVERFLOWS:
            history = ", ".join(f"{one:g}" for one in self._scales)
            raise NumericsError(
                f"fp16 loss scale fell to engine.min_loss_scale={self._minimum:g} and "
                f"{self._num_overflows} steps in a row overflowed there: nothing is learnt any "
                f"more. Scales of the last steps: {history}. Lower optim.lr, raise "
                "schedule.warmup_steps, check the data of the last steps, or use bf16 hardware"
            )
