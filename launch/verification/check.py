"""What one check of a run's folder found."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from trainer.errors import CheckpointError

State = Literal["ok", "problem", "unchecked"]


@dataclass(frozen=True)
class Check:
    """One result.

    Attributes:
        topic: checkpoint, config, lives, metrics, lease, left-overs, inputs, parents, exports,
            code, replay.
        state: ``ok``; ``problem``: something is damaged or was changed; ``unchecked``: nobody can
            tell, and ``what`` says why.
        what: what is so.
        remedy: what to do about a problem.
        run: folder of the run, as it is to be shown.
    """

    topic: str
    state: State
    what: str
    remedy: str = ""
    run: str = ""

    def __post_init__(self) -> None:
        if self.state == "problem" and not self.remedy:
            raise ValueError(f"a problem needs a remedy: {self.what}")

    def of(self, run: str) -> Check:
        """Return the check as one of ``run``."""
        return dataclasses.replace(self, run=run)


def ok(topic: str, what: str) -> Check:
    """Return a check that found all well."""
    return Check(topic, "ok", what)


def problem(topic: str, what: str, remedy: str) -> Check:
    """Return a check that found damage or a change."""
    return Check(topic, "problem", what, remedy)


def unchecked(topic: str, why: str) -> Check:
    """Return a check that could not be made."""
    return Check(topic, "unchecked", why)


def exit_code(checks: Iterable[Check]) -> int:
    """Return 66 (damaged run folder) when one found a problem, else 0."""
    return CheckpointError.exit_code if any(c.state == "problem" for c in checks) else 0


def as_data(checks: Iterable[Check]) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    listed = list(checks)
    return {"exit_code": exit_code(listed), "checks": [dataclasses.asdict(c) for c in listed]}
