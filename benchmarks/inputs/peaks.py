"""Time and peak memory of a computation that is repeated in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch


def measure_repeats(compute: Callable[[], torch.Tensor], repeats: int) -> dict[str, float]:
    """Run ``compute`` and return what it takes beyond the memory in use before.

    Args:
        compute: one forward and backward pass; returns the loss.
        repeats: passes; of their times the best count.

    Returns:
        ``peak_mb``, ``wall_s``, ``cpu_s`` and the last ``loss``.
    """
    on_gpu = torch.cuda.is_available()
    before = _start_peak(on_gpu)
    wall, cpu = [], []
    for _ in range(repeats):
        _synchronize(on_gpu)
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = compute()
        _synchronize(on_gpu)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
    peak_mb = (_read_peak(on_gpu) - before) / 1e6
    return {"peak_mb": peak_mb, "wall_s": min(wall), "cpu_s": min(cpu), "loss": loss.item()}


def _synchronize(on_gpu: bool) -> None:
    """Wait for the GPU; a CPU has nothing to wait for."""
    if on_gpu:
        torch.cuda.synchronize()


def _start_peak(on_gpu: bool) -> int:
    """Reset the peak and return the bytes in use now."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS; proc(5)
    return _read_peak(on_gpu)


def _read_peak(on_gpu: bool) -> int:
    """Return the most bytes in use since ``_start_peak``."""
    if on_gpu:
        return int(torch.cuda.max_memory_allocated())
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
