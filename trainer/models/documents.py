"""Where the documents of a batch of packed rows lie."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

GROUP_RATIO = 1.25  # longest to shortest document of a group, so at most a fifth is filler
# A group's width is a multiple of this. The CPU's bf16 matmul compiles and keeps code for every new
# width: 400 random ones cost 500 MB and a third more time than their multiples of 16.
GROUP_UNIT = 16


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch lie.

    Attributes:
        lengths: tokens of each document, rows one after another; they add up to the batch.
        num_rows: rows of the batch.
        device: of the batch.
    """

    lengths: tuple[int, ...]
    num_rows: int
    device: torch.device

    @classmethod
    def find(cls, position_ids: Tensor) -> Documents:
        """Find the documents by where positions do not go on.

        Args:
            position_ids: ``[batch, seq]``. One transfer from the device.
        """
        begins = torch.ones_like(position_ids, dtype=torch.bool)
        begins[:, 1:] = position_ids.diff(dim=1) != 1
        starts = begins.flatten().nonzero().flatten().tolist()
        lengths = tuple(b - a for a, b in pairwise([*starts, position_ids.numel()]))
        return cls(lengths, len(position_ids), position_ids.device)

    @property
    def packed(self) -> bool:
        """Whether any row holds more than one document."""
        return len(self.lengths) > self.num_rows

    @cached_property
    def bounds(self) -> Tensor:
        """``[documents + 1]`` int32: where each begins in the flattened batch, and the end."""
        lengths = torch.tensor((0, *self.lengths))
        return lengths.cumsum(0).to(self.device, torch.int32)

    @cached_property
    def groups(self) -> tuple[Tensor, ...]:
        """Flat positions ``[documents of the group, width]`` of documents of like lengths.

        What follows a shorter document's end is filler, which causal attention never looks at.
        """
        groups: list[list[int]] = []
        for i in self._by_length:
            if groups and self.lengths[i] <= GROUP_RATIO * self.lengths[groups[-1][0]]:
                groups[-1].append(i)
            else:
                groups.append([i])
        widths = [-(-self.lengths[group[-1]] // GROUP_UNIT) * GROUP_UNIT for group in groups]
        starts, last = self._starts, sum(self.lengths) - 1
        indices = (
            starts[group, None] + torch.arange(width)
            for group, width in zip(groups, widths, strict=True)
        )
        return tuple(index.clamp(max=last).to(self.device) for index in indices)

    @cached_property
    def places(self) -> Tensor:
        """``[tokens]``: where each token lies in the concatenation of all groups."""
        widths = [group.shape[1] for group in self.groups for _ in range(len(group))]
        shifts = torch.empty(len(self.lengths), dtype=torch.long)
        order = torch.tensor(self._by_length)
        shifts[order] = torch.tensor([0, *widths[:-1]]).cumsum(0) - self._starts[order]
        every = torch.arange(sum(self.lengths))
        return (every + shifts.repeat_interleave(torch.tensor(self.lengths))).to(self.device)

    @property
    def _starts(self) -> Tensor:
        return torch.tensor([0, *self.lengths[:-1]]).cumsum(0)

    @property
    def _by_length(self) -> list[int]:
        return sorted(range(len(self.lengths)), key=self.lengths.__getitem__)

    def same(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return whether two positions of a row are of one document (a mask function)."""
        lengths = torch.tensor(self.lengths, device=self.device)
        ids = torch.arange(len(lengths), device=self.device).repeat_interleave(lengths)
        ids = ids.view(self.num_rows, -1)
        return ids[row, query] == ids[row, key]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Return the additive whole-row mask ``[rows, 1, seq, seq]``, for models that need one."""
        seq = sum(self.lengths) // self.num_rows
        at = torch.arange(seq, device=self.device)
        rows = torch.arange(self.num_rows, device=self.device)[:, None, None]
        allowed = self.same(rows, at[:, None], at) & (at <= at[:, None])
        mask = torch.zeros(allowed.shape, dtype=dtype, device=self.device)
        return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


@dataclass(frozen=True)
class DocumentMask:
    """What stands in the place of a layer's attention mask.

    Attributes:
        documents: of the batch.
        window: tokens a query sees, itself included; None sees its document's whole past.
    """

    documents: Documents
    window: int | None
