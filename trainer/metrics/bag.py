"""Running sums that stay on the device until they are logged."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

Mark = tuple[dict[str, Tensor], dict[str, Tensor]]


class MetricBag:
    """Collect scalar metrics without a host synchronisation; sum them over ranks once.

    Every rank must add the same names between two drains; ``drain`` proves that it was so.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Start empty.

        Args:
            device: where the sums live, the device of the added tensors.
        """
        self._device = torch.device(device)
        self._totals: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor | float, weight: Tensor | float = 1.0) -> None:
        """Add to a weighted mean: drains to Σ value·weight / Σ weight over steps and ranks."""
        weight = self._scalar(weight)
        self.add_ratio(name, self._scalar(value) * weight, weight)

    def add_ratio(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add to a ratio of sums: drains to Σ total / Σ count (a summed loss and its targets)."""
        self._accumulate(self._totals, name, total)
        self._accumulate(self._counts, name, count)

    def add_sum(self, name: str, value: Tensor | float) -> None:
        """Add to a plain sum over steps and ranks."""
        self._accumulate(self._totals, name, value)

    def drain(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Sum over ranks, move to the host in one transfer, and start empty again.

        Args:
            reduce: returns the sum over ranks of one float64 tensor [num_sums + 2]; with a single
                rank the identity.

        Returns:
            Plain floats by name, sorted; a ratio whose count is zero is NaN.

        Raises:
            RuntimeError: when ranks added different names.
        """
        totals, counts = sorted(self._totals), sorted(self._counts)
        layout = zlib.crc32("\n".join([*totals, "", *counts]).encode())
        # One and the layout's checksum travel along: equal layouts sum to ranks × checksum.
        head = torch.tensor([1.0, float(layout)], dtype=torch.float64, device=self._device)
        sums = [self._totals[name] for name in totals] + [self._counts[name] for name in counts]
        sums = [value.to(self._device) for value in sums]
        flat = reduce(torch.cat([head, torch.stack(sums)]) if sums else head).tolist()
        if flat[1] != flat[0] * layout:
            raise RuntimeError(
                f"ranks added different metrics; this rank has {', '.join(totals) or 'none'}"
            )
        values = dict(zip(totals, flat[2:], strict=False))
        for name, count in zip(counts, flat[2 + len(totals) :], strict=True):
            values[name] = values[name] / count if count else float("nan")
        self.forget()
        return values

    def mark(self) -> Mark:
        """Return what has been added so far."""
        return dict(self._totals), dict(self._counts)

    def back_to(self, mark: Mark) -> None:
        """Take back what was added since ``mark``: of a step that was skipped."""
        self._totals, self._counts = mark

    def forget(self) -> None:
        """Start empty: what was added is of steps that the run has undone."""
        self._totals.clear()
        self._counts.clear()

    def _scalar(self, value: Tensor | float) -> Tensor:
        """Return a detached float64 scalar; a number stays on the host.

        Moving it would wait for the device, adding it to a tensor there does not.
        """
        if isinstance(value, Tensor):
            return value.detach().to(self._device, torch.float64)
        return torch.tensor(value, dtype=torch.float64)

    def _accumulate(self, sums: dict[str, Tensor], name: str, value: Tensor | float) -> None:
        scalar = self._scalar(value)
        sums[name] = sums[name] + scalar if name in sums else scalar
