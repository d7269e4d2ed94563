"""What one rank of ``kuroshio doctor`` is told: as JSON on its standard input."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RankPlan:
    """The place of a node's ranks, and what they look at.

    Attributes:
        node: this node, one of ``nodes``.
        nodes: all nodes of the job; the ranks of the first one meet the others.
        ranks_per_node: on each of them.
        address, port: where rank 0 listens.
        folder: the check's own folder, beside the run folder and on its file system.
        folders: others to look at, by purpose.
        interface: network interface that the profile names; None: the library's choice.
        expects_gpu: whether ranks compute on GPUs, by the profile.
        wait_s: a node that is silent for longer is given up.
    """

    node: str
    nodes: tuple[str, ...]
    ranks_per_node: int
    address: str
    port: int
    folder: str
    folders: dict[str, str]
    interface: str | None
    expects_gpu: bool
    wait_s: float

    @classmethod
    def read(cls, text: str) -> RankPlan:
        """Build the plan from what ``write`` returned."""
        values = json.loads(text)
        return cls(**{**values, "nodes": tuple(values["nodes"])})

    def write(self) -> str:
        """Return the plan as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @property
    def world_size(self) -> int:
        """All ranks."""
        return len(self.nodes) * self.ranks_per_node

    def rank(self, local_rank: int) -> int:
        """Return the rank of this node's ``local_rank``."""
        return self.nodes.index(self.node) * self.ranks_per_node + local_rank

    def node_of(self, rank: int) -> str:
        """Return the node of ``rank``."""
        return self.nodes[rank // self.ranks_per_node]


def local_rank(environ: Mapping[str, str]) -> int:
    """Return this rank's number on its node: ours when started here, else Slurm's."""
    return int(environ.get("LOCAL_RANK") or environ.get("SLURM_LOCALID") or 0)
