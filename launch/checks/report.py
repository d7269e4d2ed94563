"""What the ranks of a job say of themselves, as lines of JSON on their standard output.

Standard output travels through Slurm, so that a node whose run folder cannot be written, or is
another one, still tells so. A line holds one fact and stays short: srun keeps lines of several
ranks apart up to about a thousand bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from launch.checks.files import FolderFacts

MAX_PROBLEM_CHARS = 300


@dataclass(frozen=True)
class LinkFacts:
    """One all-reduce among the ranks of some nodes.

    Attributes:
        nodes: one node, a pair, or all.
        backend: gloo or nccl.
        gb_per_s: bus bandwidth.
        latency_us: of the smallest message.
        problem: why there are no figures.
    """

    nodes: tuple[str, ...]
    backend: str
    gb_per_s: float = 0.0
    latency_us: float = 0.0
    problem: str = ""


@dataclass(frozen=True)
class RankReport:
    """What one rank said before it ended, or until now.

    Attributes:
        rank, node, local_rank: its place.
        device: name of its GPU or CPU.
        has_gpu: whether it computes on one; None before it looked.
        tflops, memory_gb_per_s: of its device; None until it has measured.
        folders: those of its node, from the node's first rank.
        interface: problem with the profile's network interface; empty when there is none.
        clock_s: its clock minus rank 0's, and the uncertainty of that; None before they met.
        sees_run_folder: whether a file of rank 0 is in its run folder; None before they met.
        absent: of rank 0: ranks that it never met.
        links: all-reduces it took part in, first rank of a node only.
        problem: why it stopped early.
        is_done: whether it came to its end.
    """

    rank: int
    node: str
    local_rank: int
    device: str = ""
    has_gpu: bool | None = None
    tflops: float | None = None
    memory_gb_per_s: float | None = None
    folders: list[FolderFacts] = field(default_factory=list)
    interface: str = ""
    clock_s: tuple[float, float] | None = None
    sees_run_folder: bool | None = None
    absent: list[int] = field(default_factory=list)
    links: list[LinkFacts] = field(default_factory=list)
    problem: str = ""
    is_done: bool = False


def line(rank: int, key: str, value: Any) -> str:
    """Return the line by which ``rank`` tells one fact: a field of its report, or one entry."""
    return json.dumps({"rank": rank, key: value}, ensure_ascii=False)


def read_lines(lines: Iterable[str]) -> dict[int, RankReport]:
    """Return the report of every rank that said where it is; other lines are passed over."""
    values: dict[int, dict[str, Any]] = {}
    for text in lines:
        if not text.startswith('{"rank": '):
            continue
        try:
            fact = json.loads(text)
        except ValueError:
            continue  # a line cut off by the end of its node
        known = values.setdefault(fact["rank"], {"folders": [], "links": []})
        if "folder" in fact:
            known["folders"].append(FolderFacts(**fact["folder"]))
        elif "link" in fact:
            nodes = tuple(fact["link"].pop("nodes"))
            known["links"].append(LinkFacts(nodes=nodes, **fact["link"]))
        else:
            known.update(fact)
    return {rank: _build(facts) for rank, facts in sorted(values.items()) if "place" in facts}


def _build(facts: dict[str, Any]) -> RankReport:
    node, local_rank = facts.pop("place")
    clock = facts.pop("clock_s", None)
    offset = None if clock is None else (clock[0], clock[1])
    return RankReport(node=node, local_rank=local_rank, clock_s=offset, **facts)
