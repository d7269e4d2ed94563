"""A copy of what a rank saves, in host memory, for a thread to write while training goes on."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from trainer.engine import collectives
from trainer.engine.shard_file import Layout

# A power of two, which is what torch rounds pinned memory up to.
BLOCK_NUMEL = 1 << 24  # 64 MiB of fp32
SHARE_OF_FREE = 0.5  # of the host's free memory that copies may take: files are cached there, too


class HostCopy:
    """Blocks of host memory, kept from save to save: taking them anew costs more than the copy.

    Args:
        pinned: whether a GPU copies into it.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._blocks: list[torch.Tensor] = []
        self.layout: Layout = []
        self._numel = 0

    def take(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy tensors [numel], fp32, by key; when it returns they may change."""
        self.layout, self._numel = [], 0
        for key, tensor in tensors:
            self.layout.append((key, tensor.numel()))
            self._append(tensor.detach())
        if self._pinned:
            torch.cuda.synchronize()  # the copies were only asked for

    def _append(self, tensor: torch.Tensor) -> None:
        done = 0
        while done < tensor.numel():
            number, start = divmod(self._numel, BLOCK_NUMEL)
            if number == len(self._blocks):
                self._blocks.append(torch.empty(BLOCK_NUMEL, pin_memory=self._pinned))
            room = self._blocks[number][start : start + tensor.numel() - done]
            room.copy_(tensor[done : done + len(room)], non_blocking=self._pinned)
            done += len(room)
            self._numel += len(room)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield what was copied, one after another: cut otherwise than in ``layout``."""
        for start in range(0, self._numel, BLOCK_NUMEL):
            yield self._blocks[start // BLOCK_NUMEL][: self._numel - start]


def fits_beside_others(num_bytes: int) -> str:
    """Return why copies of this size do not fit on some rank's host, empty if they do.

    Every rank must call this; the answer is empty on all or on none.
    """
    host = socket.gethostname()
    asked = [text.split() for text in collectives.gather_texts(f"{num_bytes} {host}")]
    on_host = sum(int(size) for size, name in asked if name == host)
    free = free_host_bytes()
    is_short = on_host > SHARE_OF_FREE * free
    if not collectives.any_over_ranks(is_short):
        return ""
    if not is_short:
        return "another node has too little free memory"
    return f"{on_host / 1e9:.1f} GB on {host}, of which {free / 1e9:.1f} GB are free"


def free_host_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the memory that this process could still take: of the machine, and of its job.

    Args:
        proc: where Linux tells of processes.
        groups: where control groups are mounted; Slurm limits a job by one.
    """
    lines = (proc / "meminfo").read_text().splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    free = float(int(kib) << 10)
    for line in (proc / "self/cgroup").read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers in ("", "memory"):
            folder = groups / controllers / name.lstrip("/")
            names = ("memory.max", "memory.current") if not controllers else V1_FILES
            free = min(free, *(_group_room(group, *names) for group in _up_to(folder, groups)))
    return free


V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def _up_to(folder: Path, root: Path) -> Iterator[Path]:
    """Yield a control group and those around it, each of which may have a limit."""
    while folder != root and root in folder.parents:
        yield folder
        folder = folder.parent
    yield root


def _group_room(group: Path, limit_name: str, used_name: str) -> float:
    """Return what is left of a control group's limit, files in its cache counted as free."""
    try:
        limit = (group / limit_name).read_text().strip()
        used = int((group / used_name).read_text())
        pairs = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return float("inf")  # no limit at this level, or none that is shown in here
    cached = int(pairs.get("inactive_file", pairs.get("total_inactive_file", 0)))
    return float("inf") if limit == "max" else int(limit) - used + cached
