"""Bandwidth and latency of an all-reduce among a few ranks."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist

NUM_LATENCIES = 50  # the best is the link's; what others take is of the nodes' other work
MIN_BYTES = 1 << 16
MAX_BYTES = {"gloo": 1 << 25, "nccl": 1 << 28}
ENOUGH_S = 0.1  # the size grows until one all-reduce takes half of that
NUM_TRIALS = 7


def measure(
    store: dist.Store, rank: int, world_size: int, backend: str, device: torch.device, wait_s: float
) -> tuple[float, float]:
    """Join a group of its own, measure, and leave it.

    Args:
        store: for this group alone.
        rank, world_size: within the group.
        backend: gloo or nccl.
        device: where the tensors are.
        wait_s: a rank that is silent for longer is given up.

    Returns:
        Bus bandwidth in GB/s and latency in microseconds. Bus bandwidth is bytes / seconds *
        2(n - 1)/n, which does not depend on the number of ranks n (NVIDIA, nccl-tests,
        doc/PERFORMANCE.md).

    Raises:
        RuntimeError: of the backend, when a rank cannot be reached or falls silent.
    """
    timeout = timedelta(seconds=wait_s)
    try:
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
        _all_reduce(4, device)  # makes connections
        latency_s = min(_all_reduce(4, device) for _ in range(NUM_LATENCIES))
        num_bytes = MIN_BYTES
        while _slowest(num_bytes, device) < ENOUGH_S / 2 and num_bytes < MAX_BYTES[backend]:
            num_bytes *= 2
        seconds = min(_slowest(num_bytes, device) for _ in range(NUM_TRIALS))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return num_bytes / seconds / 1e9 * 2 * (world_size - 1) / world_size, latency_s * 1e6


def _slowest(num_bytes: int, device: torch.device) -> float:
    """Return the seconds that an all-reduce takes the slowest rank; all ranks return the same."""
    took = torch.tensor(_all_reduce(num_bytes, device), device=device)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return took.item()


def _all_reduce(num_bytes: int, device: torch.device) -> float:
    """Return the seconds of summing ``num_bytes`` of float32 over the ranks."""
    tensor = torch.ones(num_bytes // 4, device=device)
    _settle(device)
    start = time.perf_counter()
    dist.all_reduce(tensor)
    _settle(device)
    return time.perf_counter() - start


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
