"""How fast a run goes, how much memory it takes, when it ends."""

from __future__ import annotations

import resource
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from trainer.metrics.rank_times import RankTimes
from trainer.plan.flops import device_peak, peak_flops_per_s

GIB = 1024**3
PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Peak:
    """FLOP/s that 100 % MFU stands for, and where the figure comes from."""

    flops_per_s: float
    source: str


def find_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """Return the data sheet's peak of ``device``, or for an unknown one a measured matmul rate.

    Processes that share a CPU must call this at the same time: each then measures its own share.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known, flops_per_s = device_peak(name), peak_flops_per_s(name, PRECISIONS[dtype])
        if known is not None and flops_per_s is not None:
            return Peak(flops_per_s, f"{known.name} {PRECISIONS[dtype]}, {known.source}")
    size = 8192 if device.type == "cuda" else 1024
    rate = measure_matmul(device, dtype, size)
    return Peak(rate, f"measured matmul {size}³ {PRECISIONS[dtype]} on {device.type}")


def measure_matmul(
    device: torch.device, dtype: torch.dtype, size: int, seconds: float = 0.2
) -> float:
    """Return the best FLOP/s of square matrix products repeated for about ``seconds``."""
    left = torch.randn(size, size, device=device).to(dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    for trial in range(1000):
        start = time.perf_counter()
        torch.matmul(left, left)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        best = best if trial == 0 else min(best, now - start)  # the first call warms up
        if now >= end and trial >= 3:
            break
    return 2 * size**3 / best


def peak_memory_gib(device: torch.device) -> float:
    """Return this process's peak memory in GiB: allocated CUDA memory, on a CPU resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB  # Linux counts KiB


def process_start_time() -> float:
    """Return when this process was created, in seconds since the epoch."""
    return psutil.Process().create_time()


class Meters:
    """Throughput, ETA, MFU and the share of wall time that trained.

    Attributes:
        own: what this rank spends before it waits for others.
    """

    def __init__(
        self,
        max_steps: int,
        device: torch.device,
        flops_per_token: float = 0.0,
        peak_flops_per_s: float | None = None,
        world_size: int = 1,
        window_steps: int = 20,
        started_at: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Start the clock of the first step.

        Args:
            max_steps: step at which the run ends.
            device: whose memory is read.
            flops_per_token: forward and backward, from ``trainer.plan.flops``.
            peak_flops_per_s: of one rank's device; None leaves MFU out.
            world_size: number of ranks, each with a device.
            window_steps: steps the current throughput averages over.
            started_at: seconds since the epoch when the job began; None = the process's start.
            clock: seconds since the epoch.
        """
        self.max_steps = max_steps
        self.device = device
        self.flops_per_token = flops_per_token
        self.peak = peak_flops_per_s and peak_flops_per_s * world_size
        self._clock = clock
        self._started_at = process_start_time() if started_at is None else started_at
        self._window: deque[tuple[int, float]] = deque(maxlen=window_steps)
        self._num_tokens, self._train_s, self._paused_s = 0, 0.0, 0.0
        self._mark = clock()
        self.own = RankTimes(device, world_size)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Keep evaluation and saving out of the throughput."""
        start = self._clock()
        self.own.is_paused = True
        try:
            yield
        finally:
            self.own.is_paused = False
            self._paused_s += self._clock() - start

    def step(self, num_tokens: int) -> None:
        """Count one finished optimizer step of ``num_tokens`` tokens over all ranks."""
        self.own.num_steps += 1
        now = self._clock()
        seconds = max(now - self._mark - self._paused_s, 1e-9)
        self._mark, self._paused_s = now, 0.0
        self._window.append((num_tokens, seconds))
        self._num_tokens += num_tokens
        self._train_s += seconds

    def read(self, step: int) -> dict[str, float]:
        """Return the figures after ``step`` (units in the names; ``mfu`` and shares in 0…1).

        Keys: ``seconds`` (of the last step), ``tokens_per_s`` (window), ``tokens_per_s_overall``,
        ``memory_gib``, ``eta_s``, ``train_time_share`` and, when a peak is known, ``mfu``.
        """
        if not self._window:
            return {"memory_gib": peak_memory_gib(self.device)}
        window_tokens = sum(tokens for tokens, _ in self._window)
        window_s = sum(seconds for _, seconds in self._window)
        figures = {
            "seconds": self._window[-1][1],
            "tokens_per_s": window_tokens / window_s,
            "tokens_per_s_overall": self._num_tokens / self._train_s,
            "memory_gib": peak_memory_gib(self.device),
            "eta_s": (self.max_steps - step) * window_s / len(self._window),
            "train_time_share": self._train_s / max(self._clock() - self._started_at, 1e-9),
        }
        if self.peak and self.flops_per_token:
            figures["mfu"] = figures["tokens_per_s"] * self.flops_per_token / self.peak
        return figures
