"""From what ranks said to the node that is slow, broken or silent."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launch.checks.files import FolderFacts
from launch.checks.finding import Finding, nodes_of
from launch.checks.report import LinkFacts, RankReport, line, read_lines
from launch.checks.rounds import plan_rounds
from launch.checks.verdict import Reports, judge

NODES = ("n1", "n2", "n3", "n4")
FOLDER = FolderFacts("run folder", "/work", "", 10**12, 10**6, 400.0, 0.0, {})


def links(nodes: tuple[str, ...] = NODES, **changes: LinkFacts) -> list[LinkFacts]:
    """Return good links of all rounds; ``n1_n2=`` replaces that of a pair."""
    groups = [group for groups in plan_rounds(nodes, 2) for group in groups]
    return [changes.get("_".join(g), LinkFacts(g, "gloo", 1.0, 100.0)) for g in groups]


def healthy(found: list[LinkFacts] | None = None, nodes: tuple[str, ...] = NODES) -> Reports:
    """Return what two ranks a node say when all is well but the links in ``found``."""
    told = links(nodes) if found is None else found
    ranks = {}
    for rank in range(2 * len(nodes)):
        node, first = nodes[rank // 2], rank % 2 == 0
        ranks[rank] = RankReport(
            rank, node, rank % 2, "GPU", True, 100.0, 2000.0,
            folders=[FOLDER] if first else [],
            clock_s=None if rank == 0 else (0.001, 0.002),
            sees_run_folder=True if first else None,
            links=[link for link in told if node in link.nodes] if first else [],
            is_done=True,
        )  # fmt: skip
    return Reports(nodes, 2, ranks, 60.0)


def changed(rank: int, reports: Reports | None = None, **values: object) -> Reports:
    reports = reports or healthy()
    one = replace(reports.ranks[rank], **values)  # type: ignore[arg-type]
    return replace(reports, ranks={**reports.ranks, rank: one})


def without(*ranks: int) -> Reports:
    reports = changed(0, absent=list(ranks))
    return replace(reports, ranks={r: v for r, v in reports.ranks.items() if r not in ranks})


def broken(*pairs: str) -> list[LinkFacts]:
    return links(**{p: LinkFacts(tuple(p.split("_")), "gloo", problem="timeout") for p in pairs})


def slow(share: float, *pairs: str) -> list[LinkFacts]:
    return links(**{p: LinkFacts(tuple(p.split("_")), "gloo", share, 100.0) for p in pairs})


def test_a_healthy_job_has_no_complaint() -> None:
    found = judge(healthy())
    assert {f.level for f in found} == {"ok"}
    text = "\n".join(f.what for f in found)
    assert "8 ranks on 4 nodes reported" in text and "6 pairs" in text and "all 4 nodes" in text


SICK = replace(FOLDER, problem="Read-only file system")
CASES = {
    "silent node": (without(4, 5), "error", ["n3"], "n3: nothing within 60 s"),
    "silent rank": (without(5), "error", ["n3"], "nothing from ranks [5]"),
    "silent first node": (without(0, 1), "error", ["n1"], "n1: nothing"),
    "node not met": (changed(0, absent=[4, 5]), "error", ["n3"], "n3: reported, but could not"),
    "first node not met": (
        changed(0, absent=[2, 3, 4, 5, 6, 7]),
        "error",
        ["n1"],
        "none of them could reach it",
    ),
    "sick device": (
        changed(3, problem="CUDA error: ECC", tflops=None, memory_gb_per_s=None),
        "error",
        ["n2"],
        "n2: a rank stopped at its own device",
    ),
    "stopped later": (changed(3, problem="Broken pipe"), "error", ["n2"], "n2: a rank stopped"),
    "slow device": (changed(7, tflops=30.0), "error", ["n4"], "n4: device 1: matrix"),
    "slowish device": (changed(7, tflops=70.0), "warning", ["n4"], "70% of the median"),
    "slow memory": (changed(2, memory_gb_per_s=900.0), "error", ["n2"], "memory 900 GB/s"),
    "no GPU": (
        replace(changed(3, has_gpu=False), expects_gpu=True),
        "error",
        ["n2"],
        "n2: no GPU is visible",
    ),
    "CPU nodes": (changed(3, has_gpu=False, device="CPU"), "warning", [], "several kinds"),
    "no interface": (changed(2, interface="ib0 is down"), "error", ["n2"], "ib0 is down"),
    "read-only folder": (changed(4, folders=[SICK]), "error", ["n3"], "cannot be written"),
    "slow disk": (
        changed(4, folders=[replace(FOLDER, mb_per_s=80.0)]),
        "warning",
        ["n3"],
        "20% of the median",
    ),
    "other folder": (changed(4, sees_run_folder=False), "error", ["n3"], "no sign of a file"),
    "wrong clock": (changed(6, clock_s=(30.0, 0.01)), "warning", ["n4"], "+30.0 s"),
    "very wrong clock": (changed(6, clock_s=(-7200.0, 0.01)), "error", ["n4"], "-7200.0 s"),
    "slow node": (healthy(slow(0.1, "n1_n3", "n2_n3", "n3_n4")), "error", ["n3"], "its best link"),
    "slowish node": (healthy(slow(0.6, "n1_n3", "n2_n3", "n3_n4")), "warning", ["n3"], "60%"),
    "slow link": (healthy(slow(0.1, "n2_n3")), "warning", [], "n2 - n3: 0.1 GB/s"),
    "slow within": (healthy(slow(0.1, "n2")), "error", ["n2"], "among its own ranks"),
    "cut node": (healthy(broken("n1_n2", "n2_n4")), "error", ["n2"], "n2: no gloo all-reduce with"),
    "cut link": (healthy(broken("n2_n3")), "error", ["n3"], "n2 - n3: no gloo all-reduce"),
    "cut within": (healthy(broken("n4")), "error", ["n4"], "among its own ranks"),
    "all together": (healthy(broken("n1_n2_n3_n4")), "error", [], "half of the nodes"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_fault_is_named_once(name: str) -> None:
    reports, level, nodes, words = CASES[name]
    bad = [f for f in judge(reports) if f.level != "ok"]
    assert [f.level for f in bad] == [level], bad
    assert nodes_of(bad, level) == nodes  # type: ignore[arg-type]
    assert words in f"{bad[0].what} {bad[0].remedy}"


def test_what_slurm_said_of_a_silent_node_is_the_reason() -> None:
    reports = replace(without(4, 5), complaints={"n3": "srun: error: Task launch failed"})
    bad = [f for f in judge(reports) if f.level != "ok"]
    assert [f.why for f in bad] == ["srun: error: Task launch failed"]


def test_two_faults_are_told_apart() -> None:
    found = broken("n1_n2", "n2_n3", "n2_n4", "n3_n4")
    bad = [f for f in judge(healthy(found)) if f.level == "error"]
    assert [f.nodes for f in bad] == [("n2",), ("n4",)]


def test_a_fault_of_all_nodes_excludes_none() -> None:
    reports = healthy()
    for rank in (0, 2, 4, 6):
        reports = changed(rank, reports, folders=[SICK], interface="ib0 does not exist")
    bad = [f for f in judge(reports) if f.level == "error"]
    assert len(bad) == 8 and nodes_of(bad, "error") == []


def test_a_sick_first_node_is_blamed_for_what_the_others_say() -> None:
    reports = changed(0, problem="CUDA error", tflops=None, memory_gb_per_s=None)
    for rank in range(1, 8):
        reports = changed(rank, reports, problem="connect timeout", clock_s=None, links=[])
    bad = [f for f in judge(reports) if f.level != "ok"]
    assert [(f.nodes, f.why) for f in bad] == [(("n1",), "CUDA error")]


def test_software_is_blamed_for_what_all_devices_say() -> None:
    reports = healthy([])
    for rank in range(8):
        reports = changed(rank, reports, problem="no kernel", tflops=None, memory_gb_per_s=None)
    bad = [f for f in judge(reports) if f.level != "ok"]
    assert nodes_of(bad, "error") == [] and len(bad) == 4
    assert all("mend the software" in f.remedy for f in bad)


def test_nobody_reported() -> None:
    bad: list[Finding] = judge(replace(healthy(), ranks={}))
    assert [f.level for f in bad] == ["error"] and "none of n1, n2, n3, n4" in bad[0].what


def test_two_nodes_are_held_against_the_profile() -> None:
    pair = ("n1", "n2")
    nccl = [LinkFacts(pair, "nccl", 20.0, 30.0)]
    reports = replace(healthy(nccl, pair), profile_gb_per_s=100.0)
    bad = [f for f in judge(reports) if f.level != "ok"]
    assert [(f.level, f.nodes) for f in bad] == [("warning", ())]
    assert "the profile says 100" in bad[0].what
    assert all(f.level == "ok" for f in judge(replace(reports, profile_gb_per_s=30.0)))


def test_late_node_is_named() -> None:
    late = {
        p: LinkFacts(tuple(p.split("_")), "gloo", 1.0, 900.0) for p in ("n1_n3", "n2_n3", "n3_n4")
    }
    bad = [f for f in judge(healthy(links(**late))) if f.level != "ok"]
    assert [(f.level, f.nodes) for f in bad] == [("warning", ("n3",))]
    assert "9.0 times the median" in bad[0].what


def test_reports_are_read_from_lines_of_any_order() -> None:
    link = {"nodes": ["n1", "n2"], "backend": "gloo", "gb_per_s": 0.5, "latency_us": 90.0}
    folder = {"purpose": "run folder", "path": "/work", "mb_per_s": 300.0}
    lines = [
        line(1, "tflops", 0.5),
        "a warning of some library",
        line(1, "link", link),
        line(1, "place", ["n2", 0]),
        line(1, "folder", folder),
        line(1, "clock_s", [0.5, 0.1]),
        line(2, "tflops", 1.0),  # it never said where it is
        line(1, "device", "CPU")[:-9],  # cut off
    ]
    assert read_lines(lines) == {
        1: RankReport(
            1, "n2", 0, tflops=0.5, clock_s=(0.5, 0.1),
            folders=[FolderFacts("run folder", "/work", mb_per_s=300.0)],
            links=[LinkFacts(("n1", "n2"), "gloo", 0.5, 90.0)],
        )
    }  # fmt: skip


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 4, 7, 8])
def test_every_pair_meets_once_and_no_node_twice_a_round(num_nodes: int) -> None:
    nodes = [f"n{i}" for i in range(num_nodes)]
    rounds = plan_rounds(nodes, 1)
    pairs = [group for groups in rounds for group in groups if len(group) == 2]
    assert sorted(pairs) == [(a, b) for i, a in enumerate(nodes) for b in nodes[i + 1 :]]
    for groups in rounds:
        busy = [node for group in groups for node in group]
        assert len(busy) == len(set(busy))
    assert len(rounds) <= num_nodes + 1


def test_ranks_of_a_node_measure_among_themselves_first() -> None:
    assert plan_rounds(["a", "b", "c"], 2)[0] == [("a",), ("b",), ("c",)]
    assert plan_rounds(["a", "b", "c"], 1)[-1] == [("a", "b", "c")]
    assert plan_rounds(["a"], 1) == []
