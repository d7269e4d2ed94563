"""Host-side collectives: small facts that all ranks must agree on.

They run over gloo on CPU tensors (the default group is created as ``cpu:gloo,cuda:nccl`` on CUDA
machines), so reading the result never waits for the device. Without a process group every function
is the one-rank case.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist


def is_distributed() -> bool:
    """Return whether a process group with more than one rank exists."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Return the element-wise sums of ``values`` over all ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if is_distributed():
        dist.all_reduce(tensor)
    return [float(v) for v in tensor]


def max_over_ranks(values: Sequence[int]) -> list[int]:
    """Return the element-wise maxima of integer ``values`` over all ranks."""
    tensor = torch.tensor(values, dtype=torch.int64)
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [int(v) for v in tensor]


def any_over_ranks(flag: bool) -> bool:
    """Return whether ``flag`` is true on any rank."""
    return bool(max_over_ranks([int(flag)])[0])


def barrier() -> None:
    """Wait until every rank is here."""
    if is_distributed():
        dist.all_reduce(torch.zeros(1))


def sum_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Sum ``tensor`` over ranks in place on its own device and return it."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def broadcast_int(value: int, source: int = 0) -> int:
    """Return rank ``source``'s integer on every rank."""
    tensor = torch.tensor([value], dtype=torch.int64)
    if is_distributed():
        dist.broadcast(tensor, source)
    return int(tensor[0])


def gather_texts(text: str) -> list[str]:
    """Return every rank's short text (of 255 bytes at most), in the order of ranks."""
    mine = torch.zeros(256, dtype=torch.uint8)
    data = text.encode()[:255]
    mine[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    everyone = [mine]
    if is_distributed():
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
    return [bytes(one.tolist()).rstrip(b"\0").decode(errors="replace") for one in everyone]


def gather_integers(values: Sequence[int]) -> list[list[int]]:
    """Return every rank's integers (as many as it has), in the order of ranks."""
    if not is_distributed():
        return [list(values)]
    [longest] = max_over_ranks([len(values)])
    mine = torch.zeros(longest + 1, dtype=torch.int64)
    mine[: len(values) + 1] = torch.tensor([len(values), *values], dtype=torch.int64)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return [one[1 : 1 + int(one[0])].tolist() for one in everyone]


def gather_figures(values: Sequence[float]) -> list[list[float]]:
    """Return every rank's numbers, as many on each, in the order of ranks, in float64."""
    mine = torch.tensor(values, dtype=torch.float64)
    everyone = [mine]
    if is_distributed():
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
    return [one.tolist() for one in everyone]


def all_ranks_equal(value: str) -> list[int]:
    """Return the ranks whose ``value`` differs from rank 0's (an empty list when all agree)."""
    if not is_distributed():
        return []
    digest = hashlib.sha256(value.encode()).digest()
    mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return [rank for rank, other in enumerate(everyone) if not torch.equal(other, everyone[0])]
