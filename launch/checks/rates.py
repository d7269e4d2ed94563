"""How fast one GPU, or one core of a CPU, multiplies matrices and moves memory."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import torch

# Rows of the square matrices: on a GPU long enough to be bound by arithmetic, on a core so short
# that others on the same machine leave some repetitions alone.
GPU_SIZE, CPU_SIZE = 8192, 256
# Bytes of a buffer, far above the caches, and of the piece of it that one repetition copies.
GPU_COPY, CPU_COPY = (1 << 30, 1 << 30), (1 << 27, 1 << 23)
SECONDS = 1.0  # a GPU that throttles does so within it
MIN_TRIALS = 20


def matmul_tflops(device: torch.device) -> float:
    """Return TFLOP/s of ``a @ b``, a and b [size, size], in the precision that training takes."""
    size = GPU_SIZE if device.type == "cuda" else CPU_SIZE
    dtype = torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = _typical_seconds(lambda: torch.mm(a, b, out=out), device)
    return 2 * size**3 / seconds / 1e12


def memory_gb_per_s(device: torch.device) -> float:
    """Return GB/s read and written by a copy within the device's memory."""
    whole, piece = GPU_COPY if device.type == "cuda" else CPU_COPY
    source = torch.ones(whole // piece, piece, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)  # not empty: first touches of pages are slow
    pieces = itertools.cycle(range(len(source)))  # the next one is not in a cache any more

    def copy() -> None:
        number = next(pieces)
        target[number].copy_(source[number])

    return 2 * piece / _typical_seconds(copy, device) / 1e9


def _typical_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Repeat ``work`` for a while; return the seconds of one.

    Of a GPU the median, in which throttling shows. Of a core the best: others that run on the
    same machine take time from some repetitions, and say nothing about the core.
    """
    trials: list[float] = []
    work()
    end = time.perf_counter() + SECONDS
    while len(trials) < MIN_TRIALS or time.perf_counter() < end:
        start = _now(device)
        work()
        trials.append(_now(device) - start)
    return statistics.median(trials) if device.type == "cuda" else min(trials)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
