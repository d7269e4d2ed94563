"""Who measures with whom: every node alone, every pair once, then all."""

from __future__ import annotations

from collections.abc import Sequence

Group = tuple[str, ...]


def plan_rounds(nodes: Sequence[str], ranks_per_node: int) -> list[list[Group]]:
    """Return rounds of groups of nodes that can measure at the same time.

    The pairs are those of a round-robin tournament by the circle method: n - 1 rounds (n of an odd
    n) in which every node has one partner at most.
    """
    rounds: list[list[Group]] = [[(node,) for node in nodes]] if ranks_per_node > 1 else []
    seats: list[str | None] = [*nodes, None] if len(nodes) % 2 else [*nodes]
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = list(zip(seats[:half], reversed(seats[half:]), strict=True))
        met = [_ordered(nodes, a, b) for a, b in pairs if a is not None and b is not None]
        rounds += [met] if met else []
        seats = [seats[0], seats[-1], *seats[1:-1]]
    if len(nodes) > 2:
        rounds.append([tuple(nodes)])
    return rounds


def _ordered(nodes: Sequence[str], first: str, second: str) -> Group:
    return (first, second) if nodes.index(first) < nodes.index(second) else (second, first)


def group_of(node: str, groups: Sequence[Group]) -> Group | None:
    """Return the group of a round that ``node`` is in; None when it has a pause."""
    return next((group for group in groups if node in group), None)
