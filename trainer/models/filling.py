"""How parameters get their values, one at a time, without leaving memory behind."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer import heartbeat

# Sets a parameter, split over the ranks or not, from its full value.
Fill = Callable[[nn.Parameter, Callable[[], Tensor]], None]
TRIM_BYTES = 1 << 26


def fill_plain(param: nn.Parameter, read: Callable[[], Tensor]) -> None:
    """Set a parameter that every rank holds whole."""
    with torch.no_grad():
        param.copy_(read().view(param.shape))


@dataclass(frozen=True)
class Made:
    """A parameter that no folder holds, read as those are that one does.

    Attributes:
        make: returns its value, equal on every rank.
    """

    make: Callable[[], Tensor]

    def get_tensor(self, name: str) -> Tensor:
        """Return its value."""
        return self.make()


class Trimming:
    """Gives freed memory back from time to time: at first that of the construction."""

    def __init__(self) -> None:
        self._num_bytes = 0
        return_freed_memory()

    def __call__(self, num_bytes: int) -> None:
        """Note that a tensor of ``num_bytes`` was read."""
        heartbeat.beat()
        self._num_bytes += num_bytes
        if self._num_bytes > TRIM_BYTES:
            return_freed_memory()
            self._num_bytes = 0


def return_freed_memory() -> None:
    """Give freed memory back to the system; glibc would keep it, up to a whole copy in the end."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)
