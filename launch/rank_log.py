"""``RUN/logs/rank_00003.log``: what a rank said, also its last words before a crash.

A process of its own copies the rank's output to where it went before and to the file, so that
nothing is lost when the rank is killed. Under Slurm each node's ``slurmstepd`` does that
(``srun --output``): it ends every other process of a step as soon as the task is gone. Under MPI a
process must not fork after ``MPI_Init``; ``mpirun --output-filename`` is its way.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
import traceback
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from launch.rendezvous import Rendezvous
from launch.run_folder import CONFIG_FILE
from trainer.errors import KuroshioError
from trainer.metrics.redaction import redact_text, secret_pattern

LOGS = "logs"
BLOCK_BYTES = 1 << 16
COPIED = ("plain", "local", "torchrun", "deepspeed", "environment")  # launchers without a way
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # meant for the rank
DRAIN_S = 2.0  # how long a rank waits for the last lines; a process it left behind may hold them
_CONTROL = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")  # colours and cursor movements of a terminal


def rank_log(run_dir: Path, rank: int) -> Path:
    """Return the file with the output of a rank."""
    return run_dir / LOGS / f"rank_{rank:05d}.log"


@contextmanager
def kept(values: dict[str, Any], found: Rendezvous) -> Iterator[None]:
    """Copy what this process writes inside the block to its rank's log, and what ended it.

    Args:
        values: the run's plain configuration; without a run folder nothing is kept.
        found: this process's place; only ranks of the launchers in ``COPIED`` are kept.
    """
    run_dir = values.get("run_dir")
    if found.launcher not in COPIED or not isinstance(run_dir, str) or not run_dir:
        yield
        return
    path = rank_log(Path(run_dir), found.rank)
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    head = f"--- {now} rank {found.rank} of {found.world_size}, process {os.getpid()}\n"
    try:
        with _copied(path, head.encode()):
            yield
    except KuroshioError as error:  # shown by the command line, after this block
        RankLog(path).add(f"kuroshio: {error}\n".encode())
        raise
    except Exception:
        RankLog(path).add(traceback.format_exc().encode("utf-8", "replace"))
        raise


class RankLog:
    """A file that whole lines are appended to, once its run has claimed the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._secrets = secret_pattern(os.environ)
        self._waiting = b""
        self._is_off = False

    def add(self, lines: bytes) -> None:
        """Append ``lines``, or keep them until the run exists: a refused one writes nothing.

        Secrets are blanked, also in what programs of a rank write. One write for all of them, so
        that the lines of two processes do not mix.
        """
        text = lines.decode("utf-8", "surrogateescape")
        self._waiting += redact_text(text, self._secrets).encode("utf-8", "surrogateescape")
        if self._is_off or not (self.path.parent.parent / CONFIG_FILE).exists():
            return
        try:
            self.path.parent.mkdir(exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                file.write(self._waiting)
        except OSError as error:  # a full disk must not cost the run its output
            self._is_off = True
            print(f"kuroshio: {self.path} is not written any more: {error}", file=sys.stderr)
        self._waiting = b""


def clean_line(line: bytes) -> bytes:
    """Return what a terminal would show at last of a line with its progress bars."""
    return _CONTROL.sub(b"", line.rstrip(b"\r\n").rpartition(b"\r")[2]) + b"\n"


@contextmanager
def _copied(path: Path, head: bytes) -> Iterator[None]:
    """Put a copying process between this process's output and where it goes."""
    _flush()
    before = os.dup(1), os.dup(2)
    channels = [_open_channel(descriptor) for descriptor in (1, 2)]
    held = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
    copier = os.fork()  # before torch is loaded: no threads yet, and memory is shared
    if copier == 0:
        for _, write_end in channels:
            os.close(write_end)
        os.dup2(before[1], 2)  # where to say that the log cannot be written
        shown = {read_end: saved for (read_end, _), saved in zip(channels, before, strict=True)}
        _copy_and_exit(shown, path, head)
    signal.pthread_sigmask(signal.SIG_SETMASK, held)
    for (read_end, write_end), descriptor in zip(channels, (1, 2), strict=True):
        os.dup2(write_end, descriptor)
        os.close(write_end)
        os.close(read_end)
    try:
        yield
    finally:
        _flush()
        for saved, descriptor in zip(before, (1, 2), strict=True):
            os.dup2(saved, descriptor)
            os.close(saved)
        _await(copier)


def _open_channel(descriptor: int) -> tuple[int, int]:
    """Return the ends of a pipe; of a pseudo-terminal where the output is a terminal."""
    if not os.isatty(descriptor):
        return os.pipe()
    master, slave = pty.openpty()
    tty.setraw(slave)  # the terminal behind it translates newlines
    with suppress(OSError):  # a terminal that does not know its size
        size = os.get_terminal_size(descriptor)
        _set_size(slave, size)
    return master, slave


def _set_size(slave: int, size: os.terminal_size) -> None:
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", size.lines, size.columns, 0, 0))


def _copy_and_exit(shown: dict[int, int], path: Path, head: bytes) -> NoReturn:
    """Be the copying process."""
    code = 1
    try:
        os.setsid()  # neither Ctrl-C nor a closed terminal reaches this process
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = RankLog(path)
        log.add(head)
        _copy(shown, log)
        code = 0
    finally:
        os._exit(code)


def _copy(shown: dict[int, int], log: RankLog) -> None:
    """Copy every channel to where it is shown and to the log, until all writers are gone."""
    begun = dict.fromkeys(shown, b"")  # a line whose end has not come yet
    while begun:
        for channel in select.select(list(begun), [], [])[0]:
            block = _read(channel)
            _show(shown[channel], block)
            *lines, begun[channel] = (begun[channel] + block).split(b"\n")
            if not block:
                lines = [begun[channel]] if begun[channel] else []
                del begun[channel]
            log.add(b"".join(map(clean_line, lines)))


def _show(descriptor: int, block: bytes) -> None:
    """Write where the output went before; the log goes on when its reader is gone."""
    with suppress(OSError):
        while block:
            block = block[os.write(descriptor, block) :]


def _read(channel: int) -> bytes:
    try:
        return os.read(channel, BLOCK_BYTES)
    except OSError:  # how a pseudo-terminal tells that its writers are gone
        return b""


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _await(copier: int) -> None:
    """Give the copying process time to write the last lines, and reap it."""
    deadline = time.monotonic() + DRAIN_S
    while os.waitpid(copier, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.002)
