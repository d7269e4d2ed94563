"""From measured links to the node, or the link, that is slow or cut."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from launch.checks.finding import Finding, ok
from launch.checks.median import figure, laggards, late, level_of, spread
from launch.checks.report import LinkFacts

TOPIC = "links"
EXCLUDE = "leave it out (--exclude below) and report it to the site"
CABLE = "NCCL_DEBUG=INFO shows the transport; look at cluster.site.interface and NCCL_IB_HCA"
PROFILE_SHARE = 0.5  # of what the profile says; half of it means another transport


def judge(links: Sequence[LinkFacts], profile_gb_per_s: float | None) -> list[Finding]:
    """Judge all links of one backend after the other.

    Args:
        links: as the first rank of every node told them; both ends tell of a pair.
        profile_gb_per_s: of all GPUs of a node to other nodes, in one direction; None if unknown.
    """
    findings = []
    for backend in dict.fromkeys(link.backend for link in links):
        of_backend = [link for link in links if link.backend == backend]
        whole = merge(of_backend)
        findings += _judge_broken(whole)
        fine = [link for link in whole if not link.problem]
        findings += _judge_within(backend, [link for link in fine if len(link.nodes) == 1])
        pairs = [link for link in fine if len(link.nodes) == 2]
        expected = profile_gb_per_s if backend == "nccl" else None
        findings += _judge_pairs(backend, pairs, expected)
        findings += [_describe_all(link) for link in fine if len(link.nodes) > 2]
    return findings


def merge(links: Iterable[LinkFacts]) -> list[LinkFacts]:
    """Return each link once: the worst that its ends say of it."""
    worst: dict[tuple[str, ...], LinkFacts] = {}
    for link in links:
        other = worst.setdefault(link.nodes, link)
        if not other.problem and (link.problem or link.gb_per_s < other.gb_per_s):
            worst[link.nodes] = link
    return list(worst.values())


def _judge_broken(links: Sequence[LinkFacts]) -> list[Finding]:
    """Blame the nodes that share most broken pairs first; what is left is a link's fault."""
    broken = [link for link in links if link.problem]
    findings = []
    while broken:
        pairs = [link for link in broken if len(link.nodes) <= 2]
        counts = {node: sum(node in p.nodes for p in pairs) for p in pairs for node in p.nodes}
        if not counts:
            break  # all together failed, although the pairs did not: said below
        node = max(counts, key=lambda name: counts[name])
        alone = [link for link in broken if link.nodes == (node,)]
        if counts[node] < 2 and not alone:
            break
        findings.append(_blame(node, [link for link in broken if node in link.nodes]))
        broken = [link for link in broken if node not in link.nodes]
    return findings + [_blame_link(link) for link in broken]


def _blame(node: str, links: Sequence[LinkFacts]) -> Finding:
    others = sorted({name for link in links for name in link.nodes} - {node})
    whom = f"with {', '.join(others)}" if others else "among its own ranks"
    what = f"{node}: no {links[0].backend} all-reduce {whom}"
    return Finding(TOPIC, "error", what, links[0].problem, EXCLUDE, (node,))


def _blame_link(link: LinkFacts) -> Finding:
    what = f"{' - '.join(link.nodes)}: no {link.backend} all-reduce"
    if len(link.nodes) > 2:
        remedy = "run it with half of the nodes, then with a quarter, until it works"
        return Finding(TOPIC, "error", what, link.problem, remedy)
    remedy = "leaving out either is enough; with more nodes doctor can tell which it is"
    return Finding(TOPIC, "error", what, link.problem, remedy, link.nodes[1:])


def _judge_within(backend: str, links: Sequence[LinkFacts]) -> list[Finding]:
    """Compare what nodes do among their own ranks."""
    if not links:
        return []
    speeds = {link.nodes[0]: link.gb_per_s for link in links}
    findings = [
        Finding(
            TOPIC,
            level_of(share),
            f"{node}: {figure(speeds[node])} GB/s among its own ranks, {share:.0%} of the median",
            "ranks of one node exchange gradients most; all others wait for this one",
            EXCLUDE,
            (node,),
        )
        for node, share in laggards(speeds).items()
    ]
    return [ok(TOPIC, f"{backend} within nodes: {spread(speeds, 'GB/s')}"), *findings]


def _judge_pairs(backend: str, pairs: Sequence[LinkFacts], expected: float | None) -> list[Finding]:
    """Compare nodes by their best link: a slow node is slow in all, its partner in one only."""
    if not pairs:
        return []
    speeds = {link.nodes: link.gb_per_s for link in pairs}
    latencies = {link.nodes: link.latency_us for link in pairs}
    shown = f"{spread(speeds, 'GB/s')}; latency {spread(latencies, 'µs')}"
    findings = [ok(TOPIC, f"{backend} between nodes, {len(pairs)} pairs: {shown}")]
    nodes = sorted({node for pair in speeds for node in pair})
    if len(nodes) > 2:
        best = {node: max(speeds[pair] for pair in speeds if node in pair) for node in nodes}
        soonest = {node: min(latencies[p] for p in latencies if node in p) for node in nodes}
        slow = laggards(best)
        findings += [_slow_node(node, best[node], share) for node, share in slow.items()]
        findings += [
            _late_node(node, soonest[node], factor)
            for node, factor in late(soonest).items()
            if node not in slow
        ]
        well = {pair: speed for pair, speed in speeds.items() if not set(pair) & set(slow)}
        findings += [_slow_link(pair, well[pair], share) for pair, share in laggards(well).items()]
    middle = statistics.median(speeds.values())
    if expected is not None and middle < PROFILE_SHARE * expected:
        what = (
            f"{backend} between nodes: {figure(middle)} GB/s, the profile says {figure(expected)}"
        )
        why = "collectives take another way than the network they should"
        findings.append(Finding(TOPIC, "warning", what, why, CABLE))
    return findings


def _slow_node(node: str, speed: float, share: float) -> Finding:
    what = f"{node}: its best link has {figure(speed)} GB/s, {share:.0%} of the median node's"
    why = "every step waits for the slowest node's gradients"
    return Finding(TOPIC, level_of(share), what, why, EXCLUDE, (node,))


def _late_node(node: str, latency: float, factor: float) -> Finding:
    what = f"{node}: its quickest link takes {figure(latency)} µs, {factor:.1f} times the median"
    why = "small collectives, of which a step has hundreds, wait for it"
    return Finding(TOPIC, "warning", what, why, EXCLUDE, (node,))


def _slow_link(pair: tuple[str, ...], speed: float, share: float) -> Finding:
    what = f"{' - '.join(pair)}: {figure(speed)} GB/s, {share:.0%} of the median link"
    why = "both nodes are quick with others: a cable or a switch port between the two"
    remedy = "leave out either of them if jobs that have both are slow; report the link"
    return Finding(TOPIC, "warning", what, why, remedy)


def _describe_all(link: LinkFacts) -> Finding:
    speed = f"{figure(link.gb_per_s)} GB/s, latency {figure(link.latency_us)} µs"
    return ok(TOPIC, f"{link.backend} among all {len(link.nodes)} nodes: {speed}")
