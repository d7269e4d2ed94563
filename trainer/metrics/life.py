"""The lives of a run as people ask about them: how long on how many ranks, why they ended."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from trainer import errors
from trainer.errors import EXIT_RESUME

# The first sentence of an error's docstring says what its exit code means.
MEANINGS = {
    error.exit_code: (error.__doc__ or "").partition(";")[0].partition(":")[0].rstrip(".")
    for error in vars(errors).values()
    if isinstance(error, type) and issubclass(error, errors.KuroshioError)
} | {0: "done", EXIT_RESUME: "stopped after a save"}


@dataclass(frozen=True)
class Life:
    """One life of a run; None is unknown. Times are seconds since the epoch."""

    started: float | None
    ended: float | None
    host: str
    job: str | None
    restart: int  # by Slurm
    attempt: int  # by the job's script, since then
    launcher: str
    directory: str  # it started in
    world_size: int | None
    exit_code: int | None
    step: int | None  # of the newest checkpoint at its end
    rank: int | None  # that said why it ended; None is the job script
    reason: str
    decision: str  # of the job script
    decision_reason: str

    @property
    def has_ended(self) -> bool:
        """Return whether an end is recorded; a crash of the machine leaves none."""
        return self.ended is not None or self.exit_code is not None

    @property
    def why(self) -> str:
        """Return why it ended, empty when nobody recorded it; a job script knows most."""
        if self.decision_reason or self.reason or self.exit_code is None:
            return self.decision_reason or self.reason
        return describe_exit(self.exit_code)

    def seconds(self, until: float | None) -> float | None:
        """Return how long it lasted, up to ``until`` if no end is recorded; None is unknown."""
        end = self.ended if self.ended is not None else until
        return None if self.started is None or end is None else max(0.0, end - self.started)


def build_life(record: Mapping[str, Any]) -> Life:
    """Return a life from its lines in ``lives.jsonl``; what is missing or odd is unknown."""
    job = record.get("job")
    return Life(
        started=read_time(record.get("started")),
        ended=read_time(record.get("ended")),
        host=str(record.get("host") or ""),
        job=None if job is None else str(job),
        restart=_whole(record.get("restart")) or 0,
        attempt=_whole(record.get("attempt")) or 0,
        launcher=str(record.get("launcher") or ""),
        directory=str(record.get("directory") or ""),
        world_size=_whole(record.get("world_size")),
        exit_code=_whole(record.get("exit_code")),
        step=_whole(record.get("step")),
        rank=_whole(record.get("rank")),
        reason=str(record.get("reason") or ""),
        decision=str(record.get("decision") or ""),
        decision_reason=str(record.get("decision_reason") or ""),
    )


def rank_hours(lives: Sequence[Life], until: float | None) -> tuple[float, bool]:
    """Return hours times ranks of all lives, and whether that is all of it.

    Args:
        lives: in the order of their starts.
        until: when the last life was seen alive at last; an earlier one without an end counts
            nothing, and the sum is then a lower bound.
    """
    total, is_whole = 0.0, True
    for number, life in enumerate(lives):
        seconds = life.seconds(until if number == len(lives) - 1 else None)
        if seconds is None or life.world_size is None:
            # A life that failed before it began trained nothing.
            is_whole = is_whole and life.started is None
        else:
            total += seconds * life.world_size / 3600
    return total, is_whole


def describe_exit(code: int) -> str:
    """Return what an exit code means."""
    if code > 128 and code - 128 in set(signal.Signals):
        return f"killed by {signal.Signals(code - 128).name}"
    return MEANINGS.get(code, f"exit code {code}")


def read_time(value: Any) -> float | None:
    """Return ISO text (of local time without an offset) or seconds as seconds since the epoch."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, str):
        return None
    try:
        # Python 3.10 does not read the Z that other programs write.
        return datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
