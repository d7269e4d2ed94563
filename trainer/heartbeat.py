"""Heartbeats: what each rank is doing, in a small file each; who of them has fallen silent.

A rank calls ``beat`` and ``phase`` where it gets on; that stores a tuple and nothing more. The
watchdog's thread writes it, about once a second, to ``RUN/heartbeats/00003.rank_00001`` (of rank 1
in the third life). A file is written in place with one write of a fixed length, so that no reader
finds half of it and no name is made or renamed: a file system shared by many ranks sees one open
and one small write a second from each. Standard library only: login nodes and the end of a job
read this.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

FOLDER = "heartbeats"
RECORD_BYTES = 512
LEFT = "left"  # phase of a rank that ended by itself
# Phases that hold a rank in one call for long, without a place to beat.
UNCUT = ("load", "save", "leave")
BETWEEN = "agree"  # phase between steps, where the ranks agree on what comes next
MAX_NAMED = 8  # ranks named one by one in a message
PROJECT = str(Path(__file__).resolve().parents[1])
WAITS_IN = f"{os.sep}torch{os.sep}distributed{os.sep}"

State = Literal["works", "stuck", "waits", "silent", "missing", "left"]


class Pulse(NamedTuple):
    """What this process is doing.

    Attributes:
        phase: such as ``step`` or ``save``.
        step: optimizer steps done.
        at: monotonic time of the last progress.
    """

    phase: str
    step: int
    at: float


_pulse = Pulse("load", 0, time.monotonic())
_finished = {BETWEEN}  # phases that this process has been through once


def beat(phase: str | None = None, step: int | None = None) -> None:
    """Note that this process gets on, in another phase or after another step if they are given."""
    global _pulse
    old = _pulse
    _pulse = Pulse(
        old.phase if phase is None else phase,
        old.step if step is None else step,
        time.monotonic(),
    )


@contextmanager
def phase(name: str, step: int | None = None) -> Iterator[None]:
    """Note that this process is in a phase inside the block, and in the former one after it."""
    former = _pulse.phase
    beat(name, step)
    try:
        yield
    finally:
        _finished.add(name)
        beat(former)


def pulse() -> Pulse:
    """Return what this process is doing."""
    return _pulse


def is_uncut(name: str) -> bool:
    """Return whether a phase may hold a rank for long; the first time, anything may compile."""
    return name in UNCUT or name not in _finished


@dataclass(frozen=True)
class Beat:
    """What a rank's file says.

    Attributes:
        rank, host, pid, token: whose it is; the token is the life's.
        number: of the beat, counted by its writer: another clock is not needed to see it go on.
        step: optimizer steps done.
        phase: what the rank is doing.
        idle_s: seconds since its last progress, when this was written.
        where: in what function its main thread is, known once it has made no progress for a while.
        waits: whether that is inside a collective, where it waits for others.
        time: seconds since the epoch, by the writer's clock.
    """

    rank: int
    host: str
    pid: int
    token: int
    number: int
    step: int
    phase: str
    idle_s: float
    where: str
    waits: bool
    time: float


KINDS: dict[str, Any] = {
    "rank": int, "host": str, "pid": int, "token": int, "number": int, "step": int, "phase": str,
    "idle_s": float, "where": str, "waits": bool, "time": float,
}  # fmt: skip


def beat_path(run_dir: Path, token: int, rank: int) -> Path:
    """Return the file of a rank in a life."""
    return run_dir / FOLDER / f"{token:05d}.rank_{rank:05d}"


def write_beat(path: Path, beat: Beat) -> None:
    """Write a rank's file in place; it must exist."""
    text = _encode(beat)
    if len(text) >= RECORD_BYTES:  # long names, of three bytes a letter: the place can be missed
        text = _encode(replace(beat, where=""))
    descriptor = os.open(path, os.O_WRONLY)
    try:
        # Closed at once: over NFS others see a file as it was when it was last closed.
        os.pwrite(descriptor, text.ljust(RECORD_BYTES - 1) + b"\n", 0)
    finally:
        os.close(descriptor)


def _encode(beat: Beat) -> bytes:
    return json.dumps(asdict(beat), ensure_ascii=False).encode("utf-8", "replace")


def read_beat(path: Path) -> Beat | None:
    """Return what a rank's file says, None where there is none or nothing in it yet."""
    try:
        values = json.loads(path.read_bytes())
        return Beat(**{name: kind(values[name]) for name, kind in KINDS.items()})
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return None


def read_beats(run_dir: Path, token: int, world_size: int) -> list[Beat | None]:
    """Return the heartbeats of a life, by rank."""
    return [read_beat(beat_path(run_dir, token, rank)) for rank in range(world_size)]


def read_life(run_dir: Path, token: int) -> list[tuple[Beat, float]]:
    """Return the heartbeats of a life by rank, each with its time by the file system's clock."""
    found = []
    for path in sorted((run_dir / FOLDER).glob(f"{token:05d}.rank_*")):
        with suppress(FileNotFoundError):  # a newer life removes them
            at, beat = path.stat().st_mtime, read_beat(path)
            found += [(beat, at)] if beat else []
    return found


def start_files(run_dir: Path, token: int, rank: int) -> Path:
    """Make a rank's file; rank 0 removes those of earlier lives, which then write none any more."""
    path = beat_path(run_dir, token, rank)
    path.parent.mkdir(exist_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666))
    for old in path.parent.iterdir() if rank == 0 else ():
        number = old.name.partition(".")[0]
        if number.isdigit() and int(number) < token:
            old.unlink(missing_ok=True)
    return path


@dataclass(frozen=True)
class Finding:
    """What became of a rank; ``beat`` is its last, None for a missing one.

    Of a missing rank nothing is known: it has not begun, or cannot write its file.
    """

    rank: int
    state: State
    beat: Beat | None

    def describe(self, now: float) -> str:
        """Return who it is and what it does; ``now`` in seconds since the epoch."""
        if self.beat is None:
            return f"rank {self.rank} has left no heartbeat (its log says why, if it has begun)"
        last, head = self.beat, f"rank {self.rank} on {self.beat.host}"
        done = f"step {last.step}, phase {last.phase}"
        if self.state == "silent":
            return f"{head} is silent for {max(0.0, now - last.time):.0f} s ({done})"
        doing = {"waits": "waits for others", "works": "works", "left": "has left"}
        at = f" in {last.where}" if last.where else ""
        return f"{head} {doing.get(self.state, 'hangs')}{at} for {last.idle_s:.0f} s ({done})"


def judge(
    before: Sequence[Beat | None], after: Sequence[Beat | None], busy_s: float
) -> list[Finding]:
    """Return what became of each rank between two looks at the heartbeats.

    Args:
        before: of each rank, at the first look.
        after: at the second, some beats later.
        busy_s: a rank whose last progress is not longer ago works.
    """
    looks = enumerate(zip(before, after, strict=True))
    return [Finding(rank, _judge_one(*pair, busy_s), pair[1]) for rank, pair in looks]


def _judge_one(before: Beat | None, after: Beat | None, busy_s: float) -> State:
    if after is None:
        return "missing"
    if after.phase == LEFT:
        return "left"
    if before is not None and before.number == after.number:
        return "silent"
    if after.idle_s <= busy_s:
        return "works"
    return "waits" if after.waits else "stuck"


def is_hopeless(findings: Sequence[Finding]) -> bool:
    """Return whether waiting is in vain: somebody is gone, or surely nobody works any more."""
    states = {finding.state for finding in findings}
    return "silent" in states or not states & {"works", "missing"}


def culprits(findings: Sequence[Finding]) -> list[Finding]:
    """Return the ranks that the others wait for: those gone, else those that hang elsewhere."""
    for states in (("silent",), ("stuck",), ("works", "missing")):
        found = [finding for finding in findings if finding.state in states]
        if found:
            return found
    return list(findings)  # all wait: they do not agree on what for


def name_culprits(findings: Sequence[Finding], now: float) -> str:
    """Return one line that names the ranks that the others wait for, and how many wait."""
    named = culprits(findings)
    parts = [finding.describe(now) for finding in named[:MAX_NAMED]]
    if len(named) > MAX_NAMED:
        parts.append(f"{len(named) - MAX_NAMED} more ranks likewise")
    waiting = [one.beat for one in findings if one.state == "waits" and one not in named]
    steps = [beat.step for beat in waiting if beat is not None]
    if steps:
        who = "1 rank waits" if len(steps) == 1 else f"{len(steps)} ranks wait"
        parts.append(f"{who} for others after step {max(steps)}")
    return "; ".join(parts)


def describe_rank(run_dir: Path, rank: int) -> str:
    """Return host, step and phase of a rank at its last beat, empty when it left none."""
    paths = (run_dir / FOLDER).glob(f"*.rank_{rank:05d}")
    last = read_beat(max(paths, default=run_dir / FOLDER))
    return "" if last is None else f"on {last.host}, step {last.step}, phase {last.phase}"


def describe_last(run_dir: Path, token: int | None) -> str:
    """Return, to be appended, what the last rank to beat in a life did; empty if none did."""
    found = read_life(run_dir, token) if token is not None else []
    last, _ = max(found, key=lambda pair: pair[0].time, default=(None, 0.0))
    return "" if last is None else f", last seen after step {last.step} in phase {last.phase}"


def find_main_thread() -> tuple[str, bool]:
    """Return in what function of the project the main thread is, and whether it waits for others.

    Outside the project it is the innermost function; it waits if ``torch.distributed`` is on the
    stack, with the host: a device's collective is waited for where its result is read.
    """
    main = threading.main_thread().ident
    frame = sys._current_frames().get(main) if main is not None else None
    place, waits, innermost = "", False, frame
    while frame is not None:
        path = frame.f_code.co_filename
        waits = waits or WAITS_IN in path
        if not place and path.startswith(PROJECT) and "site-packages" not in path:
            place = _show_place(frame.f_code.co_name, path, frame.f_lineno)
        frame = frame.f_back
    if not place and innermost is not None:
        code = innermost.f_code
        place = _show_place(code.co_name, code.co_filename, innermost.f_lineno)
    return place, waits


def _show_place(name: str, path: str, line: int | None) -> str:
    return f"{name} ({path.removeprefix(PROJECT).lstrip(os.sep)[-80:]}:{line})"
