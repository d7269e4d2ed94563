"""What runs of stage dpo recorded, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def tabulate_dpo(rows: Sequence[dict[str, Any]]) -> str:
    """Return the evaluations of a run on pairs as Markdown, log-probabilities per answer."""
    lines = ["| step | loss | accuracy | 95 % interval | margin | log π chosen | rejected | KL |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        interval = f"{row['accuracy_low']:.1%} to {row['accuracy_high']:.1%}"
        lines.append(
            f"| {row['step']} | {row['loss']:.4f} | {row['accuracy']:.1%} | {interval} "
            f"| {row['margin']:.3f} | {row['chosen_logps']:.1f} | {row['rejected_logps']:.1f} "
            f"| {row['kl']:.2f} |"
        )
    return "\n".join(lines)
