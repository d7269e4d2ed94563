"""Which number format a device computes natively; free of DeepSpeed, so that inference asks too."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def native_precision() -> str:
    """Return ``bf16`` where it is computed natively, else ``fp16`` on a GPU, ``fp32`` on a CPU."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
