"""Ranks on this machine: start them, pass signals on, end them together."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from types import FrameType

from launch.rendezvous import PARENT_KEY, Rendezvous, free_port
from trainer.errors import EXIT_RESUME, LostRankError, PortTakenError

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE_S = 5.0  # between asking and killing the other ranks once one has died; they cannot save
LINGER_S = 60.0  # between the first rank that left for a signal and the end of a hanging one
SETTLE_S = 0.5  # between the first failure seen and the choice of the rank to name
POLL_S = 0.05
MAX_PORTS = 3  # tried: one may be taken in the seconds between its choice and its use
PR_SET_PDEATHSIG = 1  # prctl(2)


def threads_per_rank(local_world_size: int) -> int:
    """Return the CPU threads a rank may use so that a node's ranks share its cores."""
    slurm = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if slurm.isdigit():
        return int(slurm)
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)


def follow_parent(environ: Mapping[str, str]) -> None:
    """Make this rank save and leave when the `kuroshio run` that started it is killed."""
    if PARENT_KEY not in environ:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(environ[PARENT_KEY]):  # it was killed before we asked to be told
        sys.exit(128 + signal.SIGTERM)


def accept_signals() -> None:
    """Let this rank receive signals, now that it has handlers for them."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)


def run_ranks(
    command: Sequence[str],
    num_ranks: int,
    stdin: str,
    describe: Callable[[int], str] = lambda _: "",
) -> int:
    """Run ``command`` once per rank and wait for all of them.

    SIGTERM, SIGINT and SIGUSR1 are passed on once to every rank, which then save; a second SIGINT
    kills them. When a rank dies, the others are ended: they could only wait for it.

    Args:
        command: what each rank runs.
        num_ranks: how many, with local ranks 0 to ``num_ranks - 1``.
        stdin: text every rank finds on its standard input.
        describe: returns where a rank was when it failed, empty where nobody knows.

    Returns:
        0, EXIT_RESUME when the ranks stopped for a signal after saving, or the exit code of the
        rank that failed first (128 + n when signal n killed it).
    """
    code = PortTakenError.exit_code
    for trial in range(MAX_PORTS):
        if trial:
            print("kuroshio: starting the ranks again with another port", file=sys.stderr)
        code = _run_ranks(command, num_ranks, stdin, describe)
        if code != PortTakenError.exit_code:
            break
    return code


def _run_ranks(
    command: Sequence[str], num_ranks: int, stdin: str, describe: Callable[[int], str]
) -> int:
    """Do what ``run_ranks`` does, once."""
    port = free_port()
    places = [
        Rendezvous(rank, num_ranks, rank, num_ranks, "127.0.0.1", port, "local")
        for rank in range(num_ranks)
    ]
    ranks: list[subprocess.Popen[str]] = []
    copiers: list[threading.Thread] = []
    with _forwarding(ranks):
        try:
            with _blocked_signals():
                for place in places:
                    ranks.append(_start(command, place))
                    if place.rank > 0:
                        copiers.append(_copy_output(ranks[-1], place.rank))
            for process in ranks:
                _feed(process, stdin)
            return _wait(ranks, describe)
        finally:
            _end(ranks)
            for copier in copiers:
                copier.join(GRACE_S)  # a rank's last words


def _start(command: Sequence[str], place: Rendezvous) -> subprocess.Popen[str]:
    """Start one rank; rank 0 writes to our terminal, the others into a pipe."""
    environ: MutableMapping[str, str] = dict(os.environ)
    environ.update({PARENT_KEY: str(os.getpid())})
    environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(place.local_world_size)))
    place.export(environ)
    output = None if place.rank == 0 else subprocess.PIPE
    return subprocess.Popen(
        command,
        env=environ,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=None if place.rank == 0 else subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # a terminal's Ctrl-C reaches the ranks through us, once
    )


def _feed(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin:  # a rank that died is found later
        process.stdin.write(text)


def _copy_output(process: subprocess.Popen[str], rank: int) -> threading.Thread:
    """Copy a rank's output to our standard error, line by line behind its number."""

    def copy() -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                sys.stderr.write(f"[rank {rank}] {line}")
                sys.stderr.flush()

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Hold signals back while ranks start; these inherit that until ``accept_signals``.

    So a signal reaches all ranks or, if it comes early, none before it can handle it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _forwarding(ranks: Sequence[subprocess.Popen[str]]) -> Iterator[None]:
    """Pass signals on to the ranks for the length of a block."""
    interrupts = 0

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        for process in ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL if interrupts > 1 else number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence[subprocess.Popen[str]], describe: Callable[[int], str]) -> int:
    """Wait until all ranks ended well or one failed; return the exit code of the whole."""
    first_left: float | None = None
    while True:
        codes = [process.poll() for process in ranks]
        if any(code not in (None, 0, EXIT_RESUME) for code in codes):
            return _blame(ranks, describe)
        if None not in codes:
            return max(code or 0 for code in codes)
        if EXIT_RESUME in codes:
            first_left = first_left or time.monotonic()
            if time.monotonic() - first_left > LINGER_S:
                late = [rank for rank, code in enumerate(codes) if code is None]
                print(f"kuroshio: ranks {late} hang after the others left", file=sys.stderr)
                return EXIT_RESUME
        time.sleep(POLL_S)


def _blame(ranks: Sequence[subprocess.Popen[str]], describe: Callable[[int], str]) -> int:
    """Say which rank failed and return its exit code.

    A rank whose peer is gone may end before that peer has: one with a reason of its own is named.
    """
    time.sleep(SETTLE_S)
    codes = {rank: process.poll() or 0 for rank, process in enumerate(ranks)}
    failed = [rank for rank, code in codes.items() if code not in (0, EXIT_RESUME)]
    rank = min(failed, key=lambda rank: codes[rank] == LostRankError.exit_code)
    code = codes[rank]
    cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited {code}"
    place = describe(rank)
    where = f" (it was {place})" if place else ""
    print(f"kuroshio: rank {rank} {cause}; ending the others{where}", file=sys.stderr)
    return 128 - code if code < 0 else code


def _end(ranks: Sequence[subprocess.Popen[str]]) -> None:
    """End and reap every rank that is still there."""
    for process in ranks:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in ranks:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
