"""From the reports of all ranks to findings that name the slow or broken node. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from launch.checks import files, link_verdict
from launch.checks.finding import Finding, error, ok, warning
from launch.checks.median import figure, laggards, level_of, spread
from launch.checks.report import RankReport

TOPIC = "ranks"
EXCLUDE = "leave it out (--exclude below) and report it to the site"
SICK_DISK_SHARE = 0.25  # of the median; shared file systems scatter by more than two


@dataclass(frozen=True)
class Reports:
    """What the ranks of a job said, and how many there should be.

    Attributes:
        nodes: all nodes of the job, in the order of their ranks.
        ranks_per_node: on each.
        ranks: reports by rank; those that never came are missing.
        wait_s: how long a silent node was waited for.
        profile_gb_per_s: of a node to others, by the profile; None if unknown.
        expects_gpu: whether ranks compute on GPUs, by the profile.
        complaints: what Slurm, or Python, said last on the standard error of a node's ranks.
    """

    nodes: tuple[str, ...]
    ranks_per_node: int
    ranks: Mapping[int, RankReport]
    wait_s: float
    profile_gb_per_s: float | None = None
    expects_gpu: bool = False
    complaints: Mapping[str, str] = field(default_factory=dict)

    @property
    def first_ranks(self) -> list[RankReport]:
        """The ranks that speak for their nodes."""
        return [report for report in self.ranks.values() if report.local_rank == 0]

    def silent(self) -> dict[str, list[int]]:
        """Return the ranks of every node that said nothing at all."""
        found: dict[str, list[int]] = {}
        for rank in range(len(self.nodes) * self.ranks_per_node):
            if rank not in self.ranks:
                found.setdefault(self.nodes[rank // self.ranks_per_node], []).append(rank)
        return found


def judge(reports: Reports) -> list[Finding]:
    """Return the findings of all ranks together."""
    links = [link for report in reports.ranks.values() for link in report.links]
    return [
        *_judge_presence(reports),
        *_judge_problems(reports),
        *_judge_devices(reports),
        *_judge_interfaces(reports),
        *_judge_folders(reports),
        *_judge_shared(reports),
        *_judge_clocks(reports),
        *_judge_rates(reports, "matrix multiplication", "TFLOP/s", "tflops"),
        *_judge_rates(reports, "memory", "GB/s", "memory_gb_per_s"),
        *link_verdict.judge(links, reports.profile_gb_per_s),
    ]


def _judge_presence(reports: Reports) -> list[Finding]:
    silent = reports.silent()
    if not silent:
        num_ranks = len(reports.ranks)
        return [ok(TOPIC, f"{num_ranks} ranks on {len(reports.nodes)} nodes reported")]
    if len(silent) == len(reports.nodes) and not reports.ranks:
        what = f"none of {', '.join(reports.nodes)} reported within {reports.wait_s:.0f} s"
        remedy = (
            "the files node_*.err in the check's folder say why; a cold start may need --timeout"
        )
        return [error(TOPIC, what, "no rank came as far as Python's first lines", remedy)]
    return [_name_silent(reports, node, ranks) for node, ranks in silent.items()]


def _name_silent(reports: Reports, node: str, ranks: Sequence[int]) -> Finding:
    which = "nothing" if len(ranks) == reports.ranks_per_node else f"nothing from ranks {ranks}"
    what = f"{node}: {which} within {reports.wait_s:.0f} s"
    why = reports.complaints.get(node) or "the node is down, cut off, or cannot start Python"
    return Finding(TOPIC, "error", what, why, EXCLUDE, (node,))


def _judge_problems(reports: Reports) -> list[Finding]:
    """Name the nodes that fail by themselves, that rank 0 never met, or that stopped later."""
    first, silent = reports.nodes[0], reports.silent()
    stopped = dict.fromkeys(r.node for r in reports.ranks.values() if r.problem)
    sick = {r.node: "" for r in reports.ranks.values() if r.problem and r.memory_gb_per_s is None}
    findings = [_name_sick(reports, node, sick) for node in sick]
    if first in silent or first in sick:
        return findings  # it holds the meeting point: what the others complain of follows from that
    absent = reports.ranks[0].absent
    unmet = {reports.nodes[rank // reports.ranks_per_node] for rank in absent} - {*silent, *sick}
    if len(unmet) > 1 and unmet == set(reports.nodes[1:]) - {*silent, *sick}:
        what = f"{first}: {', '.join(sorted(unmet))} reported, and none of them could reach it"
        why = "it holds the meeting point of all ranks"
        return [*findings, Finding(TOPIC, "error", what, why, EXCLUDE, (first,))]
    for node in (name for name in reports.nodes if name in unmet):
        why = _reason(reports, node) or "its ranks never came to the meeting point"
        what = f"{node}: reported, but could not reach {first}"
        findings.append(Finding(TOPIC, "error", what, why, EXCLUDE, (node,)))
    if any(finding.nodes for finding in findings):
        return findings
    return findings + [
        Finding(TOPIC, "error", f"{node}: a rank stopped", _reason(reports, node), EXCLUDE, (node,))
        for node in stopped
        if node not in sick
    ]


def _name_sick(reports: Reports, node: str, sick: Mapping[str, object]) -> Finding:
    """Blame a node that cannot measure itself; when none can, the software."""
    leave = (node,) if _some(reports, sick) else ()
    everywhere = "it is so on all nodes: mend the software; `srun kuroshio doctor` looks at a node"
    what, why = f"{node}: a rank stopped at its own device", _reason(reports, node)
    return Finding(TOPIC, "error", what, why, EXCLUDE if leave else everywhere, leave)


def _reason(reports: Reports, node: str) -> str:
    problems = [r.problem for r in reports.ranks.values() if r.node == node and r.problem]
    return problems[0] if problems else ""


def _judge_devices(reports: Reports) -> list[Finding]:
    """Say what computes, and name nodes that lack GPUs, or have others than most."""
    names = Counter(report.device for report in reports.ranks.values() if report.device)
    if not names:
        return []
    findings = [ok(TOPIC, ", ".join(f"{count} x {name}" for name, count in names.items()))]
    blind = {
        r.node: "" for r in reports.ranks.values() if reports.expects_gpu and r.has_gpu is False
    }
    if blind:
        what = f"{', '.join(blind)}: no GPU is visible"
        why = "the profile has GPUs; ranks there would compute on the CPU, and all others wait"
        remedy = "ask for them (cluster.site.gres); see nvidia-smi and `kuroshio doctor` there"
        findings.append(Finding(TOPIC, "error", what, why, remedy, _some(reports, blind)))
    elif len(names) > 1:
        why = "every step waits for the slowest of them"
        remedy = "keep to nodes of one kind, by partition or cluster.exclude"
        findings.append(warning(TOPIC, "devices of several kinds", why, remedy))
    return findings


def _judge_interfaces(reports: Reports) -> list[Finding]:
    wrong = {r.node: r.interface for r in reports.first_ranks if r.interface}
    remedy = "set cluster.site.interface to one that all nodes have, or null to leave it to NCCL"
    why = "the profile names it for collectives, which would hang"
    return [
        Finding("network", "error", f"{node}: interface {text}", why, remedy, _some(reports, wrong))
        for node, text in wrong.items()
    ]


def _some(reports: Reports, nodes: Mapping[str, object]) -> tuple[str, ...]:
    """Return ``nodes`` to leave out, unless that would be all that reported."""
    there = {report.node for report in reports.ranks.values()}
    return tuple(nodes) if set(nodes) < there else ()


def _judge_folders(reports: Reports) -> list[Finding]:
    """Judge each folder on every node; what is well is said once for all of them."""
    findings = []
    purposes = dict.fromkeys(f.purpose for r in reports.first_ranks for f in r.folders)
    for purpose in purposes:
        of_node = {
            r.node: f for r in reports.first_ranks for f in r.folders if f.purpose == purpose
        }
        speeds = {node: f.mb_per_s for node, f in of_node.items() if f.mb_per_s is not None}
        if speeds:
            findings.append(ok("files", f"{purpose}: {spread(speeds, 'MB/s')} with fsync"))
        judged = {
            node: [f for f in files.judge(facts, is_run_folder=True) if f.level != "ok"]
            for node, facts in of_node.items()
        }
        errors = {
            node: 0 for node, found in judged.items() if any(f.level == "error" for f in found)
        }
        for node, found in judged.items():
            leave = (node,) if node in _some(reports, errors) else ()
            findings += [replace(f, what=f"{node}: {f.what}", nodes=leave) for f in found]
        findings += _judge_disks(purpose, speeds)
    return findings


def _judge_disks(purpose: str, speeds: Mapping[str, float]) -> list[Finding]:
    sick = {n: s for n, s in laggards(speeds).items() if s < SICK_DISK_SHARE}
    why = "a checkpoint is complete when the slowest node has written its part"
    return [
        Finding(
            "files",
            "warning",
            f"{node}: {purpose} writes {speeds[node]:.0f} MB/s, {share:.0%} of the median",
            why,
            EXCLUDE,
            (node,),
        )
        for node, share in sick.items()
    ]


def _judge_shared(reports: Reports) -> list[Finding]:
    seen = {r.node: r.sees_run_folder for r in reports.first_ranks if r.sees_run_folder is not None}
    blind = {node: "" for node, sees in seen.items() if not sees}
    if not seen:
        return []
    if not blind:
        return [ok("files", f"what {reports.nodes[0]} writes beside the run folder, all nodes see")]
    why = "every node needs the same run folder: checkpoints would lack the parts of these nodes"
    remedy = "choose a run_dir on a file system that all nodes mount"
    others = set(seen) - {reports.nodes[0]}
    leave = tuple(blind) if set(blind) < others else ()
    what = (
        f"{', '.join(blind)}: no sign of a file that {reports.nodes[0]} made beside the run folder"
    )
    return [Finding("files", "error", what, why, remedy, leave)]


def _judge_clocks(reports: Reports) -> list[Finding]:
    told = {r.node: r.clock_s for r in reports.first_ranks if r.clock_s is not None}
    offsets = {node: offset for node, (offset, _) in told.items()} | {reports.nodes[0]: 0.0}
    if len(offsets) < 2:
        return []
    middle = statistics.median(offsets.values())
    wrong = {n: o - middle for n, o in offsets.items() if abs(o - middle) > files.MAX_SKEW_S}
    if not wrong:
        widest = max(offsets.values()) - min(offsets.values())
        doubt = max(uncertainty for _, uncertainty in told.values())
        return [ok(TOPIC, f"clocks differ by {widest:.3f} s at most (measured to {doubt:.3f} s)")]
    why = "whether a run lives is told by the age of its heartbeat"
    return [
        Finding(
            TOPIC,
            "error" if abs(skew) > files.BROKEN_SKEW_S else "warning",
            f"{node}: its clock is {skew:+.1f} s from the median",
            why,
            "ask the site to set the clock (chronyc tracking shows it)",
            (node,),
        )
        for node, skew in wrong.items()
    ]


def _judge_rates(reports: Reports, what: str, unit: str, key: str) -> list[Finding]:
    """Compare every rank's device with the median of all."""
    values = {
        rank: report.tflops if key == "tflops" else report.memory_gb_per_s
        for rank, report in reports.ranks.items()
    }
    known = {rank: value for rank, value in values.items() if value is not None}
    if not known:
        return []
    findings = [ok(TOPIC, f"{what}, {len(known)} devices: {spread(known, unit)}")]
    for rank, share in laggards(known).items():
        report = reports.ranks[rank]
        place = f"{report.node}: device {report.local_rank}"
        text = f"{place}: {what} {figure(known[rank])} {unit}, {share:.0%} of the median"
        why = "every step waits for the slowest rank"
        findings.append(Finding(TOPIC, level_of(share), text, why, EXCLUDE, (report.node,)))
    return findings
