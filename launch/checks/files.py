"""Folders: writable, quick enough, with room, links and locks, on a clock that agrees with ours."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launch.checks.finding import Finding, error, ok, warning

TOPIC = "files"
PIECE_BYTES = 1 << 20
NUM_PIECES = 16  # written and synced once: small against a checkpoint, large against a latency
SLOW_MB_S = 50.0  # a checkpoint of a 7B model, 84 GB, would take half an hour
MIN_FREE_INODES = 10_000  # a run writes files in the hundreds; torch's caches in the thousands
MAX_SKEW_S = 5.0  # network file systems keep attributes for seconds
BROKEN_SKEW_S = 60.0  # leases and heartbeats of another node would look dead


@dataclass(frozen=True)
class FolderFacts:
    """What one folder allows. A figure is None where the folder cannot be written.

    Attributes:
        purpose: run folder, token stores, home, node-local scratch.
        path: the folder, or the nearest that exists above it.
        problem: why it cannot be written; empty when it can.
        free_bytes: for this user.
        free_inodes: None also where the file system does not count them (0 of 0).
        mb_per_s: of one write with fsync.
        skew_s: the file system's clock minus ours.
        refuses: of flock, lockf, link, rename: what fails there, each with the reason.
    """

    purpose: str
    path: str
    problem: str = ""
    free_bytes: int | None = None
    free_inodes: int | None = None
    mb_per_s: float | None = None
    skew_s: float | None = None
    refuses: dict[str, str] | None = None


def gather(purpose: str, path: Path) -> FolderFacts:
    """Write a small file in ``path`` (or the nearest folder above it), and remove it again."""
    folder = nearest_folder(path)
    probe = folder / f".kuroshio-doctor-{socket.gethostname()}-{os.getpid()}"
    try:
        seconds = _write(probe)
        start = time.time()
        probe.touch()  # at the clock of the file system's server
        skew, _ = skew_between(start, probe.stat().st_mtime, time.time())
        refuses = _try_all(probe)
        room = os.statvfs(folder)
        free_bytes = shutil.disk_usage(folder).free
    except OSError as failure:
        return FolderFacts(purpose, str(folder), failure.strerror or str(failure))
    finally:
        for path in (probe, _twin(probe)):
            path.unlink(missing_ok=True)
    return FolderFacts(
        purpose,
        str(folder),
        free_bytes=free_bytes,
        free_inodes=room.f_favail if room.f_files else None,
        mb_per_s=PIECE_BYTES * NUM_PIECES / 1e6 / seconds,
        skew_s=skew,
        refuses=refuses,
    )


def nearest_folder(path: Path) -> Path:
    """Return ``path``, or the first folder above it that exists."""
    whole = path.expanduser().absolute()
    return next(folder for folder in (whole, *whole.parents) if folder.is_dir())


def _write(probe: Path) -> float:
    """Write and sync the file; return the seconds."""
    piece = os.urandom(PIECE_BYTES)  # file systems that compress would make zeros quick
    start = time.perf_counter()
    with probe.open("wb") as file:
        for _ in range(NUM_PIECES):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - start


def _twin(probe: Path) -> Path:
    return probe.with_name(f"{probe.name}-twin")


def _try_all(probe: Path) -> dict[str, str]:
    """Return what the file system refuses of locks, links and renames."""
    twin = _twin(probe)
    trials: dict[str, Callable[[], object]] = {
        "flock": lambda: _lock(probe, fcntl.flock),
        "lockf": lambda: _lock(probe, fcntl.lockf),
        "link": lambda: os.link(probe, twin),
        "rename": lambda: probe.replace(twin),
    }
    refuses = {}
    for name, trial in trials.items():
        try:
            trial()
        except OSError as failure:
            refuses[name] = failure.strerror or str(failure)
    return refuses


def _lock(probe: Path, lock: Callable[[int, int], object]) -> None:
    with probe.open("r+b") as file:
        lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def judge(facts: FolderFacts, is_run_folder: bool = False) -> list[Finding]:
    """Judge one folder; a run folder needs links and renames besides."""
    where = f"{facts.purpose} {facts.path}"
    if facts.problem:
        why = f"{facts.problem}; nothing could be written there"
        remedy = "choose a folder that you may write, on a file system of all nodes; see its quota"
        return [error(TOPIC, f"{where} cannot be written", why, remedy)]
    findings = [_judge_speed(facts, where), *_judge_inodes(facts, where)]
    findings += _judge_clock(facts, where)
    return findings + _judge_refusals(facts, where, is_run_folder)


def judge_room(facts: FolderFacts, planned_bytes: float) -> list[Finding]:
    """Judge whether what a run will keep fits into the bytes that are free."""
    if facts.free_bytes is None or not planned_bytes:
        return []
    need, free = f"{planned_bytes / 1e9:.1f} GB", f"{facts.free_bytes / 1e9:.1f} GB"
    if facts.free_bytes >= planned_bytes:
        return [ok(TOPIC, f"{facts.purpose}: room for the {need} of checkpoints that are planned")]
    what = f"{facts.purpose} {facts.path}: {free} free, checkpoints will take {need}"
    why = "the save that no longer fits ends the run; what was saved before stays"
    remedy = "make room, choose another run_dir, or keep fewer (loop.keep_last, loop.keep_every)"
    return [error(TOPIC, what, why, remedy)]


def _judge_speed(facts: FolderFacts, where: str) -> Finding:
    assert facts.mb_per_s is not None and facts.free_bytes is not None
    what = f"{where}: {facts.mb_per_s:.0f} MB/s with fsync, {facts.free_bytes / 1e9:.1f} GB free"
    if facts.mb_per_s >= SLOW_MB_S:
        return ok(TOPIC, what)
    why = f"below {SLOW_MB_S:.0f} MB/s every checkpoint holds the GPUs up"
    remedy = "write to the parallel file system (run_dir=/work/...), and save less often"
    return warning(TOPIC, what, why, remedy)


def _judge_inodes(facts: FolderFacts, where: str) -> list[Finding]:
    if facts.free_inodes is None or facts.free_inodes >= MIN_FREE_INODES:
        return []
    why = "a file system without inodes refuses new files although bytes are free"
    what = f"{where}: {facts.free_inodes} inodes free"
    return [warning(TOPIC, what, why, "delete small files there, such as caches and old stores")]


def _judge_clock(facts: FolderFacts, where: str) -> list[Finding]:
    assert facts.skew_s is not None
    if abs(facts.skew_s) <= MAX_SKEW_S:
        return []
    make = error if abs(facts.skew_s) > BROKEN_SKEW_S else warning
    what = f"{where}: its clock is {facts.skew_s:+.0f} s from this machine's"
    why = "whether a run lives is told by the age of its heartbeat"
    return [make(TOPIC, what, why, "ask the site to set the clock (chronyc tracking shows it)")]


def _judge_refusals(facts: FolderFacts, where: str, is_run_folder: bool) -> list[Finding]:
    refuses = facts.refuses or {}
    locks = [name for name in ("flock", "lockf") if name in refuses]
    needed = [name for name in ("link", "rename") if name in refuses]
    findings = []
    if locks:
        what = f"{where}: no {' nor '.join(locks)} ({refuses[locks[0]]})"
        why = "Kuroshio takes no locks, but caches of datasets, triton and torch's extensions do"
        remedy = "keep HF_HOME, TRITON_CACHE_DIR and TORCH_EXTENSIONS_DIR on a node-local disk"
        findings.append(warning(TOPIC, what, why, remedy))
    if needed and is_run_folder:
        what = f"{where}: no {' nor '.join(needed)} ({refuses[needed[0]]})"
        why = "a run is claimed by a link, and a checkpoint counts from its rename on"
        findings.append(error(TOPIC, what, why, "choose a run_dir on another file system"))
    return findings


def skew_between(start_s: float, answer_s: float, end_s: float) -> tuple[float, float]:
    """Return another clock's offset and its uncertainty, asked at ``start_s``, known at ``end_s``.

    Cristian's algorithm: the answer was read somewhere between the two.
    """
    return answer_s - (start_s + end_s) / 2, (end_s - start_s) / 2
