"""The watchdog of a rank: writes its heartbeat, and ends it when the ranks get on no more.

A thread, since a hung rank's main thread sits in a call that no signal leaves. What it finds is
said once for the whole life: the first rank to see that waiting is in vain writes the verdict, the
others show their stacks when they find it, and all leave as ranks that lost another.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from trainer import heartbeat
from trainer.errors import LostRankError
from trainer.heartbeat import Beat, Finding

LOG = logging.getLogger(__name__)
KNOWN_SHARE = 0.8  # of the collective timeout: by then it has to be known who is missing
UNCUT_FACTOR = 4  # more time for phases without a place to beat
BEATS_PER_S = 64  # of all ranks together, at most: a shared file system carries them
PLACE_AFTER_S = 3.0  # without progress, until the place of the main thread is looked up
LOOK_SHARE = 0.05  # of the collective timeout, between the two looks of a judgement
LOOK_S = 30.0  # at most
MISSED_BEATS = 3  # that show silence
SUSPECT_BEATS = 1.5  # that show who of the ranks is gone, when it is sure that one is
LEAVE_BEATS = 3  # for the others to find the verdict and show their stacks
JOIN_S = 5.0


@dataclass(frozen=True)
class Post:
    """Where a watchdog stands.

    Attributes:
        run_dir: the run's folder.
        token: of the life.
        rank, world_size: of this process.
        timeout_s: ``cluster.timeout_s``.
    """

    run_dir: Path
    token: int
    rank: int
    world_size: int
    timeout_s: float

    @property
    def limit_s(self) -> float:
        """Return how long a rank may stand still: so long that judging it ends before a timeout."""
        return max(self.timeout_s / 2, KNOWN_SHARE * self.timeout_s - self.look_s)

    @property
    def interval_s(self) -> float:
        """Return the time between two beats."""
        return max(1.0, self.world_size / BEATS_PER_S)

    @property
    def look_s(self) -> float:
        """Return the time between two looks at the others: silence has to last that long."""
        return max(MISSED_BEATS * self.interval_s, min(LOOK_S, LOOK_SHARE * self.timeout_s))

    @property
    def verdict(self) -> Path:
        """Return the file that says why the ranks of this life are to leave."""
        return self.run_dir / heartbeat.FOLDER / f"{self.token:05d}.verdict"


@contextmanager
def watching(post: Post, on_end: Callable[[str], None]) -> Iterator[None]:
    """Write this rank's heartbeat, and end the process if the ranks stand still for too long.

    Args:
        post: whose.
        on_end: records why the life ends, before the process is left.
    """
    watchdog = Watchdog(post, on_end)
    heartbeat.beat("load", 0)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.stop()


class Watchdog:
    """Looks every second at what the main thread has noted."""

    def __init__(self, post: Post, on_end: Callable[[str], None]) -> None:
        self.post, self._on_end = post, on_end
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._path: Path | None = None
        self._number, self._was_missed, self._was_told = 0, False, False
        self._awake_since, self._complaints = time.monotonic(), set[str]()
        self._first_look: tuple[float, list[Beat | None]] | None = None

    def start(self) -> None:
        """Begin to beat."""
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """End the thread; the last beat says that this rank left."""
        self._over.set()
        self._thread.join(JOIN_S)
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        woke = time.monotonic()
        while not self._over.wait(self.post.interval_s):
            now = time.monotonic()
            if now - woke > self.post.look_s:  # this process was stopped itself, with its job
                self._awake_since = now
            woke = now
            # From a thread without Python: shows the stacks also where a call keeps the
            # interpreter's lock, or the file system this one, and ends what nobody else can.
            late_s = UNCUT_FACTOR * self.post.timeout_s
            faulthandler.dump_traceback_later(late_s, exit=True, file=_errors())
            try:
                self._beat()
                self._judge(now)
            except Exception as error:  # without this thread that alarm would end a healthy run
                self._complain(error)
        heartbeat.beat(heartbeat.LEFT)
        self._beat()

    def _complain(self, error: Exception) -> None:
        """Say once of each kind what this thread cannot do; a file system may be back soon."""
        kind = type(error).__name__
        if kind not in self._complaints:
            self._complaints.add(kind)
            LOG.warning("rank %d cannot be watched for now: %s: %s", self.post.rank, kind, error)

    def _idle_s(self) -> float:
        return time.monotonic() - max(heartbeat.pulse().at, self._awake_since)

    def _beat(self) -> None:
        """Write the heartbeat; a file system that is away for a while must not end a run."""
        pulse, idle_s = heartbeat.pulse(), self._idle_s()
        where, waits = heartbeat.find_main_thread() if idle_s > PLACE_AFTER_S else ("", False)
        self._number += 1
        post = self.post
        try:
            if self._path is None:
                self._path = heartbeat.start_files(post.run_dir, post.token, post.rank)
            own = (post.rank, socket.gethostname(), os.getpid(), post.token, self._number)
            doing = (pulse.step, pulse.phase, round(idle_s, 1), where, waits)
            heartbeat.write_beat(self._path, Beat(*own, *doing, round(time.time(), 1)))
            self._was_missed = False
        except OSError as error:
            if not self._was_missed:
                LOG.warning(
                    "rank %d can leave no heartbeat in %s for now: %s; it trains on, but the "
                    "others cannot tell what it does",
                    *(post.rank, post.run_dir / heartbeat.FOLDER, error),
                )
            self._was_missed = True

    def _judge(self, now: float) -> None:
        """Look at the others twice, some beats apart, once this rank stands still for too long."""
        idle_s = self._idle_s()
        if idle_s > min(PLACE_AFTER_S, self.post.limit_s) and self.post.verdict.exists():
            self._leave(f"rank {self.post.rank} ends: another rank has said why")
        if idle_s < self.post.limit_s:
            self._first_look = None
        elif self._first_look is None:
            self._first_look = now, self._read()
        elif now - self._first_look[0] >= self.post.look_s:
            before, self._first_look = self._first_look[1], None
            self._decide(idle_s, heartbeat.judge(before, self._read(), self.post.limit_s / 2))

    def _read(self) -> list[Beat | None]:
        return heartbeat.read_beats(self.post.run_dir, self.post.token, self.post.world_size)

    def _decide(self, idle_s: float, findings: list[Finding]) -> None:
        """Leave if waiting is hopeless, else say once who is waited for."""
        allowed = self.post.limit_s * (UNCUT_FACTOR if self._is_uncut() else 1)
        gone = any(finding.state == "silent" for finding in findings)
        if findings[self.post.rank].state in ("silent", "missing"):
            gone = False  # not even this one's file is written: they tell nothing
        message = (
            f"no progress for {idle_s:.0f} s (cluster.timeout_s={self.post.timeout_s:g} allows "
            f"{allowed:.0f} s in phase {heartbeat.pulse().phase}): "
            f"{heartbeat.name_culprits(findings, time.time())}"
        )
        if heartbeat.is_hopeless(findings) and (gone or idle_s > allowed):
            others = [finding for finding in findings if finding.rank != self.post.rank]
            self._condemn(message, any(f.state in ("works", "stuck", "waits") for f in others))
        elif not self._was_told:
            self._was_told = True
            LOG.warning("%s; waiting on", message)
            show_stacks()

    def _is_uncut(self) -> bool:
        return heartbeat.is_uncut(heartbeat.pulse().phase)

    def _condemn(self, message: str, can_read: bool) -> None:
        """End the life: tell the others, record why, leave once they have shown their stacks.

        Args:
            message: who is missing.
            can_read: whether another rank is left that will find the verdict.
        """
        try:
            descriptor = os.open(self.post.verdict, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            with os.fdopen(descriptor, "w") as file:
                file.write(message + "\n")
        except FileExistsError:
            self._leave(f"rank {self.post.rank} ends: another rank has said why")
        except OSError as error:
            LOG.warning("the other ranks are not told: %s", error)
        show_last_words(message)
        try:
            self._on_end(message)
            if can_read:
                time.sleep(LEAVE_BEATS * self.post.interval_s)
        finally:
            os._exit(LostRankError.exit_code)

    def _leave(self, message: str) -> None:
        show_last_words(message)
        os._exit(LostRankError.exit_code)  # the main thread is in a call that does not end


def explain_loss(post: Post) -> str:
    """Return who is gone when a collective has failed, empty if nobody is silent.

    A rank that left by itself has said why. Several that seem silent are given more time: a file
    system may show their beats late.
    """
    place = (post.run_dir, post.token, post.world_size)
    before, found, waited = heartbeat.read_beats(*place), list[Finding](), 0.0
    for beats in (SUSPECT_BEATS, MISSED_BEATS):
        time.sleep((beats - waited) * post.interval_s)
        waited = beats
        found = heartbeat.judge(before, heartbeat.read_beats(*place), post.limit_s / 2)
        if sum(finding.state == "silent" for finding in found) <= 1:
            break
    findings = [finding for finding in found if finding.state in ("silent", "stuck", "missing")]
    return heartbeat.name_culprits(findings, time.time()) if findings else ""


def show_last_words(message: str) -> None:
    """Write stacks and a message, if anybody reads them: the process has to be left anyway."""
    with suppress(OSError, ValueError):
        show_stacks()
        print(f"kuroshio: {message}", file=sys.stderr, flush=True)


def show_stacks() -> None:
    """Write the stacks of all threads of this process to where it writes errors."""
    faulthandler.dump_traceback(_errors(), all_threads=True)


def _errors() -> TextIO:
    """Return a file of the system's: ``faulthandler`` writes without Python."""
    return sys.__stderr__ or sys.stderr
