"""Who lives in a run folder: numbered leases, so that an older life cannot write into a newer one.

``RUN/leases/00003.json`` is the third life's. Its number is its token, taken by creating the file,
which only one process can; the highest number owns the folder. The file's time of modification is
the life's heartbeat. ``00003.end`` appears when that life ends. A life whose ranks outlive it (a
node cut off and given up by Slurm) finds a higher number and must not write any more.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.errors import LeaseError

LOG = logging.getLogger(__name__)
LEASES_NAME = "leases"
HEARTBEAT_S = 10.0
STALE_S = 60.0  # without a heartbeat: file systems may show a change only after half a minute


@dataclass(frozen=True)
class Process:
    """A process that can be told from every other: of which boot, in which namespace."""

    boot: str
    namespace: str
    pid: int
    started: int  # clock ticks since boot

    @classmethod
    def own(cls) -> Process:
        """Return this process."""
        return cls(*_machine(), os.getpid(), _start_ticks(os.getpid()) or 0)

    def is_visible(self) -> bool:
        """Return whether this machine can tell if the process lives."""
        return (self.boot, self.namespace) == _machine()

    def is_alive(self) -> bool:
        """Return whether it still runs; only for a visible one."""
        return _start_ticks(self.pid) == self.started


def _machine() -> tuple[str, str]:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return boot, str(Path("/proc/self/ns/pid").readlink())


def _start_ticks(pid: int) -> int | None:
    """Return when a process started, None when there is none (a zombie is none)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


@dataclass(frozen=True)
class Holder:
    """What a lease says of its life.

    Attributes:
        token: its number.
        host: of rank 0.
        job: Slurm job, None outside Slurm.
        restart: how often Slurm had restarted the job.
        process: of rank 0.
        claimed: ISO time.
        heartbeat: seconds since the epoch, by the file system's clock.
        has_ended: whether it said how it ended.
        attempt: how often the job's script had started the ranks again since then.
        damage: what is wrong with the file, then ``token``, ``heartbeat`` and ``has_ended`` alone
            are known; empty for nothing.
    """

    token: int
    host: str
    job: str | None
    restart: int
    process: Process
    claimed: str
    heartbeat: float
    has_ended: bool
    attempt: int = 0
    damage: str = ""


def newest_token(run_dir: Path) -> int:
    """Return the highest token taken in a run folder, 0 for none."""
    folder = run_dir / LEASES_NAME
    stems = [path.stem for path in folder.glob("*.json")]
    return max((int(stem) for stem in stems if stem.isdigit()), default=0)


def read_holder(run_dir: Path) -> Holder | None:
    """Return the newest lease of a run folder, None when nobody ever lived there."""
    token = newest_token(run_dir)
    if not token:
        return None
    path = lease_path(run_dir, token)
    beat, has_ended = path.stat().st_mtime, path.with_suffix(".end").exists()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values["process"] = Process(**values["process"])
        return Holder(**values, heartbeat=beat, has_ended=has_ended)
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # after a power failure
        damage = f"{type(error).__name__}: {error}"
        nobody = Process("", "", 0, 0)
        whose = (token, "an unknown host", None, 0, nobody, "")
        return Holder(*whose, heartbeat=beat, has_ended=has_ended, damage=damage)


def lease_path(run_dir: Path, token: int) -> Path:
    """Return the file of a lease."""
    return run_dir / LEASES_NAME / f"{token:05d}.json"


def create_file(path: Path, data: Mapping[str, Any]) -> bool:
    """Create a whole file that must not exist yet; return False if another process was first."""
    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(json.dumps(dict(data), ensure_ascii=False))
            file.flush()
            os.fsync(file.fileno())  # or a node that loses power leaves an empty one
        os.link(aside, path)
    except FileExistsError:
        return False
    finally:
        aside.unlink(missing_ok=True)
    return True


@dataclass(frozen=True)
class Lease:
    """The right of one life to write into its run folder; every rank of the life holds it."""

    run_dir: Path
    token: int

    @classmethod
    def take(cls, run_dir: Path, token: int, life: Mapping[str, Any], claimed: str) -> Lease | None:
        """Take a token on rank 0; return None if another life took it a moment before."""
        own = {"host": socket.gethostname(), **life, "process": asdict(Process.own())}
        data = {"token": token, **own, "claimed": claimed}
        return cls(run_dir, token) if create_file(lease_path(run_dir, token), data) else None

    def check(self) -> None:
        """Stop a life that is no longer the newest of its folder.

        Raises:
            LeaseError: another life owns the folder.
        """
        if newest_token(self.run_dir) <= self.token:  # a lower one is a listing of a moment ago
            return
        other = read_holder(self.run_dir)
        assert other is not None
        whose = f"Slurm job {other.job}" if other.job else f"process {other.process.pid}"
        raise LeaseError(
            f"run_dir={self.run_dir} belongs to life {other.token} ({whose} on {other.host}) by "
            f"now; this is life {self.token}, which was given up for lost: it writes nothing more"
        )

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Show that the life goes on, from a thread of rank 0: steps and saves may be long."""
        over = threading.Event()
        thread = threading.Thread(target=self._beat, args=(over,), name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()

    def _beat(self, over: threading.Event) -> None:
        path, was_missed = lease_path(self.run_dir, self.token), False
        while not over.wait(HEARTBEAT_S):
            try:
                os.utime(path)
                was_missed = False
            except OSError as error:  # a file system that hangs for a while must not end a run
                if not was_missed:
                    LOG.warning("no heartbeat in %s: %s", path, error)
                was_missed = True
