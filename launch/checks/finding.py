"""What a check found: good, doubtful or wrong, and what to do about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from trainer.errors import ConfigError

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One result of one check.

    Attributes:
        topic: environment, slurm, files, network, artefacts, ranks.
        level: ``ok``; ``warning``: training works, but worse; ``error``: it would fail.
        what: what is so.
        why: what follows from it, unless all is well.
        remedy: what to do, unless all is well.
        nodes: nodes that the next job should do without.
    """

    topic: str
    level: Level
    what: str
    why: str = ""
    remedy: str = ""
    nodes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.level != "ok" and not (self.why and self.remedy):
            raise ValueError(f"a finding of level {self.level} needs why and remedy: {self.what}")


def ok(topic: str, what: str) -> Finding:
    """Return a finding that needs nothing."""
    return Finding(topic, "ok", what)


def warning(topic: str, what: str, why: str, remedy: str) -> Finding:
    """Return a finding about something that makes training worse, not impossible."""
    return Finding(topic, "warning", what, why, remedy)


def error(topic: str, what: str, why: str, remedy: str) -> Finding:
    """Return a finding about something that a run would fail of."""
    return Finding(topic, "error", what, why, remedy)


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 78 (no retry cures it) when one is an error, else 0."""
    return ConfigError.exit_code if any(f.level == "error" for f in findings) else 0


def nodes_of(findings: Iterable[Finding], level: Level) -> list[str]:
    """Return the nodes that findings of ``level`` say to do without, sorted."""
    return sorted({node for f in findings if f.level == level for node in f.nodes})


def as_data(findings: list[Finding]) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    return {
        "exit_code": exit_code(findings),
        "exclude": nodes_of(findings, "error"),
        "slow": nodes_of(findings, "warning"),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
