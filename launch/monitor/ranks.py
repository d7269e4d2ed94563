"""What there is to say of single ranks of a run: who is slow, silent or stands still."""

from __future__ import annotations

from trainer.heartbeat import LEFT, Beat, Finding, State, name_culprits
from trainer.lease import STALE_S
from trainer.metrics.run_facts import RunFacts, figure

SLOW_SHARE = 0.1  # of the median rank's time in a step; a smaller delay is not worth a line


def rank_lines(facts: RunFacts) -> list[str]:
    """Return a line for a rank that holds the others up, and one for ranks that do not get on."""
    return [line for line in (describe_standstill(facts), describe_slowest(facts)) if line]


def describe_slowest(facts: RunFacts) -> str:
    """Return who was slowest in the last steps, empty if it hardly matters."""
    median_s, slowest = figure(facts.ranks, "median_s"), facts.ranks.get("slowest")
    if not median_s or not isinstance(slowest, list) or not slowest:
        return ""
    first = slowest[0] if isinstance(slowest[0], dict) else {}
    seconds, data_s = figure(first, "seconds"), figure(first, "data_seconds")
    if seconds is None or seconds - median_s < SLOW_SHARE * median_s:
        return ""
    of_it = f", {data_s:.2f} s of it for data" if data_s is not None else ""
    return (
        f"rank {first.get('rank')} on {first.get('host')} is the slowest: {seconds:.2f} s a step "
        f"by itself{of_it}; the median rank {median_s:.2f} s"
    )


def describe_standstill(facts: RunFacts) -> str:
    """Return who is silent, hangs or waits for long, empty when all ranks get on."""
    findings = [
        Finding(beat.rank, _judge(beat, facts.seconds_since(at)), beat) for beat, at in facts.beats
    ]
    if all(finding.state in ("works", "left") for finding in findings):
        return ""
    return f"no progress: {name_culprits(findings, facts.now)}"


def _judge(beat: Beat, age_s: float) -> State:
    """Judge a rank by the age of its file, of which file systems tell late."""
    if beat.phase == LEFT:
        return "left"
    if age_s > STALE_S:
        return "silent"
    if beat.idle_s < STALE_S:
        return "works"
    return "waits" if beat.waits else "stuck"
