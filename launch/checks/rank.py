"""One rank of ``kuroshio doctor``: looks, measures, meets the others, measures with them."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from launch.checks import allreduce, files, rates, report
from launch.checks.files import FolderFacts
from launch.checks.meeting import Meeting
from launch.checks.rank_plan import RankPlan
from launch.checks.report import MAX_PROBLEM_CHARS
from launch.checks.rounds import Group, group_of, plan_rounds
from launch.rendezvous import device_index
from trainer.environment import name_device

LINK_WAIT_S = 15.0  # a node that answers takes milliseconds; the first NCCL group some seconds
MEASURING_S = 60.0  # what the slowest link may take besides
TOKEN_WAIT_S = 10.0  # network file systems keep the names of a folder for seconds
MAX_FAILED_LINKS = 2  # a node with as many is not measured any further


class Rank:
    """A rank's place, its device, and how it tells what it finds."""

    def __init__(self, plan: RankPlan) -> None:
        self.plan, self.rank = plan, plan.rank
        self.is_first = plan.local_rank == 0  # of its node: speaks for it
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", device_index(plan.local_rank, os.environ))
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(1)  # rates are those of a core

    def tell(self, key: str, value: Any) -> None:
        """Print one fact of this rank's report."""
        print(report.line(self.rank, key, value), flush=True)

    def tell_problem(self, failure: Exception) -> None:
        """Print why this rank stops."""
        self.tell("problem", short(failure))

    def examine(self) -> None:
        """Look at this node and measure this device."""
        self.tell("place", [self.plan.node, self.plan.local_rank])
        self.tell("interface", self._choose_interface())
        if self.is_first:
            for purpose, path in self._folders().items():
                folder = Path(os.path.expandvars(path))  # as jobs use cluster.site.local_scratch
                self.tell("folder", dataclasses.asdict(look(purpose, folder)))
        self.tell("device", name_device(self.device))
        self.tell("has_gpu", self.device.type == "cuda")
        self.tell("tflops", rates.matmul_tflops(self.device))
        self.tell("memory_gb_per_s", rates.memory_gb_per_s(self.device))

    def _folders(self) -> dict[str, str]:
        return {"run folder's file system": self.plan.folder, **self.plan.folders}

    def _choose_interface(self) -> str:
        """Make the libraries take the profile's interface; return what is wrong with it."""
        name = self.plan.interface
        if name is None:
            return ""
        stats = psutil.net_if_stats()
        if name in stats and stats[name].isup:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
            return ""
        up = ", ".join(key for key, value in stats.items() if value.isup and key != "lo")
        return f"{name} {'is down' if name in stats else 'does not exist'}; up are {up or 'none'}"


def look(purpose: str, folder: Path) -> FolderFacts:
    """Look at a folder that must be there already."""
    if not folder.is_dir():
        return FolderFacts(purpose, str(folder), "it does not exist on this node")
    return files.gather(purpose, folder)


def short(failure: Exception) -> str:
    """Return the first line of an error, cut to what fits into a line of the report."""
    lines = str(failure).splitlines() or [type(failure).__name__]
    return lines[0][:MAX_PROBLEM_CHARS]


def run(plan: RankPlan) -> None:
    """Do all of a rank's work; what it finds goes to standard output."""
    # An error of NCCL shall come back to us, not end the process.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    here = Rank(plan)
    try:
        here.examine()
        meet(here)
    except (RuntimeError, OSError) as failure:  # a sick device; torch's DistError: a rank is gone
        here.tell_problem(failure)
        return
    here.tell("is_done", True)


def meet(here: Rank) -> None:
    """Find the other ranks, compare clocks and run folders, measure links.

    Raises:
        RuntimeError: rank 0 cannot be reached any more.
    """
    plan = here.plan
    if plan.world_size == 1:
        return
    store = dist.TCPStore(
        plan.address,
        plan.port,
        is_master=here.rank == 0,
        timeout=timedelta(seconds=plan.wait_s),
        wait_for_workers=False,
    )
    meeting = Meeting(store, here.rank, plan.world_size, plan.wait_s)
    here.tell("clock_s", meeting.gather())
    if here.rank == 0:
        absent = sorted(set(range(plan.world_size)) - set(meeting.present))
        here.tell("absent", absent)
    compare_run_folders(here, meeting)
    measure_links(here, meeting)
    meeting.part()


def compare_run_folders(here: Rank, meeting: Meeting) -> None:
    """See whether every node finds a file that rank 0 made."""
    token = Path(here.plan.folder) / "token"
    said = ""
    if here.rank == 0:
        try:
            token.touch()
        except OSError as failure:
            said = short(failure)
    if meeting.agree("token", said, meeting.wait_s)[0]:
        return  # rank 0's own report of the folder says why
    if here.is_first:
        end = time.monotonic() + TOKEN_WAIT_S
        while not (seen := token.exists()) and time.monotonic() < end:
            time.sleep(0.1)
        here.tell("sees_run_folder", seen)


def measure_links(here: Rank, meeting: Meeting) -> None:
    """Measure all rounds of groups, over gloo, then over NCCL what gloo could reach.

    Nodes that fail more than once take part no more, so that a bad one costs two timeouts.
    """
    plan, dropped, broken = here.plan, set[str](), set[Group]()
    backends = ["gloo", "nccl"] if here.device.type == "cuda" else ["gloo"]
    rounds = plan_rounds(plan.nodes, plan.ranks_per_node)
    for name, backend, groups in (
        (f"{b}/{n}", b, g) for b in backends for n, g in enumerate(rounds)
    ):
        dropped |= absent_nodes(plan, meeting.present)
        left = [without(group, dropped, broken) for group in groups]
        groups = [group for group in left if group not in broken]
        group = group_of(plan.node, groups)
        problem = measure(here, meeting, group, name, backend) if group else ""
        said = meeting.agree(f"round/{name}", problem, LINK_WAIT_S + MEASURING_S)
        failed = {plan.node_of(rank) for rank, word in said.items() if word}
        broken |= {group for group in groups if failed.intersection(group)}
        counts = Counter(node for group in broken for node in group)
        dropped |= {node for node, count in counts.items() if count >= MAX_FAILED_LINKS}


def absent_nodes(plan: RankPlan, present: list[int]) -> set[str]:
    """Return the nodes that lack a rank."""
    there = Counter(plan.node_of(rank) for rank in present)
    return {node for node in plan.nodes if there[node] < plan.ranks_per_node}


def without(group: Group, dropped: set[str], broken: set[Group]) -> Group:
    """Return what is left of a group; nothing of a pair that lost its other half.

    Of a larger group, one node of every broken pair stays away as well.
    """
    away = dropped | {pair[-1] for pair in broken if len(pair) == 2 < len(group)}
    left = tuple(node for node in group if node not in away)
    return left if len(left) >= min(2, len(group)) else ()


def measure(here: Rank, meeting: Meeting, group: Group, name: str, backend: str) -> str:
    """Measure one group's all-reduce; return why it failed, or nothing.

    Over gloo one rank of each node stands for it: that is enough to see the network, and a cut
    costs one timeout instead of one for each pair of ranks.
    """
    plan = here.plan
    per_node = 1 if backend == "gloo" and len(group) > 1 else plan.ranks_per_node
    if plan.local_rank >= per_node:
        return ""
    store = dist.PrefixStore(f"link/{name}/{'+'.join(group)}", meeting.store)
    place, size = group.index(plan.node) * per_node + plan.local_rank, len(group) * per_node
    device = here.device if backend == "nccl" else torch.device("cpu")
    link: dict[str, Any] = {"nodes": group, "backend": backend}
    problem = ""
    try:
        speed, latency = allreduce.measure(store, place, size, backend, device, LINK_WAIT_S)
        link |= {"gb_per_s": speed, "latency_us": latency}
    except RuntimeError as failure:
        problem = short(failure)
        link |= {"problem": problem}
    if here.is_first:
        here.tell("link", link)
    return problem
