"""What a check on several ranks was asked to do, and the place of one node's ranks in it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CheckPlan:
    """What all ranks are told, as JSON on their standard input.

    Attributes:
        ranks_per_node: on each node.
        folder: the check's own folder, beside the run folder and on its file system.
        folders: others to look at, by purpose.
        interface: network interface that the profile names; None: the library's choice.
        expects_gpu: whether ranks compute on GPUs, by the profile.
        wait_s: a node that is silent for longer is given up.
        profile_gb_per_s: of a node to others, by the profile; None if unknown.
    """

    ranks_per_node: int
    folder: str
    folders: dict[str, str]
    interface: str | None
    expects_gpu: bool
    wait_s: float
    profile_gb_per_s: float | None

    def write(self) -> str:
        """Return the plan as JSON."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1)


def read_plan(text: str) -> CheckPlan:
    """Return the plan that ``CheckPlan.write`` wrote."""
    return CheckPlan(**json.loads(text))


@dataclass(frozen=True)
class RankPlan(CheckPlan):
    """The same, and where this rank is.

    Attributes:
        nodes: all nodes of the job; the ranks of the first one meet the others.
        node: this one of them.
        local_rank: on its node.
        address, port: where rank 0 listens.
    """

    nodes: tuple[str, ...]
    node: str
    local_rank: int
    address: str
    port: int

    @property
    def world_size(self) -> int:
        """All ranks."""
        return len(self.nodes) * self.ranks_per_node

    @property
    def rank(self) -> int:
        """This rank among all."""
        return self.nodes.index(self.node) * self.ranks_per_node + self.local_rank

    def node_of(self, rank: int) -> str:
        """Return the node of ``rank``."""
        return self.nodes[rank // self.ranks_per_node]


def find_place(plan: CheckPlan, nodes: Sequence[str], environ: Mapping[str, str]) -> RankPlan:
    """Return the plan of this rank, from what Slurm, or ``run_here``, put in its environment."""
    return RankPlan(
        **dataclasses.asdict(plan),
        nodes=tuple(nodes),
        node=environ["SLURMD_NODENAME"] if len(nodes) > 1 else nodes[0],
        local_rank=int(environ.get("LOCAL_RANK") or environ.get("SLURM_LOCALID") or 0),
        address=environ["MASTER_ADDR"],
        port=int(environ["MASTER_PORT"]),
    )
