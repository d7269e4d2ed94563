"""Number formats: what a device computes natively, and fp16's loss scale. Free of DeepSpeed."""

from __future__ import annotations

from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter")  # the state of a loss scale


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
