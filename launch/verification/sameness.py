"""Whether two records of the same steps say the same, and two checkpoints of the same step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.verification.records import Span
from trainer.engine.manifest import read_manifest

# What a training record says of the model and its data; the rest is about time and memory.
FIGURES = (
    *("loss", "policy_loss", "value_loss", "grad_norm", "lr", "tokens"),
    *("accuracy", "margin", "chosen_reward", "rejected_reward"),
    *("reward", "score", "kl", "entropy", "response_length"),
)
# Relative, where devices, ranks or versions differ: sums are then taken in another order.
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
SMALLEST = 1e-6  # what is smaller differs by rounding alone


@dataclass(frozen=True)
class Difference:
    """The first step at which two records differ, and the largest difference of all."""

    step: int
    figure: str
    values: tuple[Any, Any]
    largest: float  # relative


def compare_spans(left: Sequence[Span], right: Sequence[Span]) -> tuple[int, Difference | None]:
    """Return how many records are of the same steps, and in what they differ, if they do."""
    others = {(span.start, span.end): span.record for span in right}
    pairs = [(s, others[s.start, s.end]) for s in left if (s.start, s.end) in others]
    first: tuple[int, str, tuple[Any, Any]] | None = None
    largest = 0.0
    for span, other in pairs:
        for figure in FIGURES:
            values = span.record.get(figure), other.get(figure)
            if values[0] != values[1]:
                first = first or (span.end, figure, values)
                largest = max(largest, relative(*values))
    return len(pairs), Difference(*first, largest) if first else None


def relative(left: Any, right: Any) -> float:
    """Return the relative difference of two figures; infinite where one is none."""
    if not isinstance(left, (int, float)) or not isinstance(right, (int, float)):
        return float("inf")
    return abs(left - right) / max(abs(left), abs(right), SMALLEST)


def describe_difference(found: Difference) -> str:
    """Return a difference in words."""
    left, right = found.values
    return (
        f"they differ first at step {found.step} in {found.figure}: {left} and {right}; "
        f"largest relative difference {found.largest:.1e}"
    )


def compare_weights(ours: Path, theirs: Path) -> tuple[float, str]:
    """Compare two checkpoints of one step by parameter name: weights and both moments.

    Returns:
        The largest absolute difference, and the parameter it is in (empty for none).
    """
    left, right = read_manifest(ours), read_manifest(theirs)
    if _hashes(left) == _hashes(right):
        return 0.0, ""
    from trainer.engine.committed import Checkpoint, Reader

    readers = Reader(Checkpoint(ours, left)), Reader(Checkpoint(theirs, right))
    largest, where = 0.0, ""
    for name in readers[0].shapes.keys() | readers[1].shapes.keys():
        if any(name not in reader.shapes for reader in readers):
            return float("inf"), name
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            one, other = (reader.read_whole(name, kind) for reader in readers)
            difference = float((one - other).abs().max()) if one.numel() else 0.0
            if difference > largest:
                largest, where = difference, f"{name} ({kind})"
    return largest, where


def _hashes(manifest: Mapping[str, Any]) -> list[str]:
    return sorted(facts["sha256"] for facts in manifest["files"].values())
