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


def find_scaler(optimizer: Any) -> Any:
    """Return what keeps the fp16 loss scale of one of DeepSpeed's optimizers."""
    own = vars(optimizer)
    return own["loss_scaler"] if "loss_scaler" in own else own["loss_scale_config"]
