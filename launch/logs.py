"""``kuroshio logs``: what a run's job and ranks said last."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from launch.monitor.sources import is_run
from launch.rank_log import LOGS, rank_log
from trainer.errors import ConfigError
from trainer.metrics.run_facts import read_run

BLOCK_BYTES = 1 << 16
POLL_S = 0.5
JOB_LOGS = "job-*.out"


def main(argv: Sequence[str]) -> int:
    """Print the last lines of the logs, and with --follow what comes after them; return 0.

    Raises:
        ConfigError: when the folder is no run's, or has no such log.
    """
    options = parse(argv)
    paths = choose_logs(options.run, options.rank)
    follower = Follower(paths, options.lines)
    try:
        follower.show_new()
        if options.lines and not follower.has_shown:
            print(f"{', '.join(map(str, paths))}: nothing yet", file=sys.stderr)
        while options.follow:
            time.sleep(POLL_S)
            follower.show_new()
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="kuroshio logs",
        allow_abbrev=False,
        description="Print the end of a run's logs: RUN/logs/job-*.out, what its newest job's "
        "script said, and RUN/logs/rank_00000.log, what a rank said in all lives.",
    )
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="the run's folder (run_dir), or another with logs/ of a job",
    )
    parser.add_argument(
        "--rank",
        type=_count,
        metavar="N",
        help="this rank only (default: the job, and the rank that ended the last life, or rank 0)",
    )
    parser.add_argument(
        "--lines", type=_count, default=20, metavar="N", help="lines of each file (%(default)s)"
    )
    parser.add_argument("--follow", action="store_true", help="go on with new lines until Ctrl-C")
    return parser.parse_args(argv)


def choose_logs(run_dir: Path, rank: int | None) -> list[Path]:
    """Return the files to show.

    Args:
        run_dir: the run's folder.
        rank: whose log; None takes the newest job's as well.

    Raises:
        ConfigError: when there is none.
    """
    is_command = (run_dir / LOGS).is_dir() and not is_run(run_dir)  # a job that is no run
    lives = [] if is_command else read_run(run_dir).lives
    ranks = sorted((run_dir / LOGS).glob("rank_*.log"))
    if rank is not None:
        if rank_log(run_dir, rank) not in ranks:
            raise ConfigError(f"--rank={rank}: {run_dir}/{LOGS} has no log of it{_known(ranks)}")
        return [rank_log(run_dir, rank)]
    jobs = sorted((run_dir / LOGS).glob(JOB_LOGS), key=lambda path: path.stat().st_mtime)
    speaker = lives[-1].rank if lives and lives[-1].exit_code else None
    chosen = jobs[-1:] + [log for log in [rank_log(run_dir, speaker or 0)] if log in ranks]
    if not chosen:
        raise ConfigError(
            f"{run_dir}/{LOGS} has no log{_known(ranks)}; a job that waits has none yet (`kuroshio "
            f"watch {run_dir}`), and under srun or mpirun by hand the launcher keeps the output"
        )
    return chosen


class Follower:
    """Prints what is new in some files, under the name of the file when it changes."""

    def __init__(self, paths: Sequence[Path], num_lines: int) -> None:
        self._places = {path: find_last_lines(path, num_lines) for path in paths}
        self._spoke: Path | None = None

    @property
    def has_shown(self) -> bool:
        """Return whether anything was printed."""
        return self._spoke is not None

    def show_new(self) -> None:
        """Print what was appended since the last call."""
        for path, place in self._places.items():
            if not path.exists():
                continue  # moved away, or its folder was; it may come back
            with path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < place:  # written anew
                    place = 0
                file.seek(place)
                while block := file.read(BLOCK_BYTES):
                    self._show(path, block)
                self._places[path] = file.tell()

    def _show(self, path: Path, block: bytes) -> None:
        if self._spoke != path and len(self._places) > 1:
            print(f"{'' if self._spoke is None else chr(10)}==> {path} <==", flush=True)
        self._spoke = path
        sys.stdout.buffer.write(block)  # as bytes: a block may end inside a character
        sys.stdout.buffer.flush()


def find_last_lines(path: Path, num_lines: int) -> int:
    """Return where the last ``num_lines`` lines of a file begin, read from its end."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        left = num_lines
        for start, block in _blocks_from_end(file, end):
            # The newline that ends the file begins no line.
            ends = [i for i, byte in enumerate(block) if byte == 10 and start + i + 1 < end]
            if len(ends) >= left:
                return start + ends[-left] + 1 if left else end
            left -= len(ends)
    return 0


def _blocks_from_end(file: BinaryIO, end: int) -> Iterator[tuple[int, bytes]]:
    while end > 0:
        start = max(0, end - BLOCK_BYTES)
        file.seek(start)
        yield start, file.read(end - start)
        end = start


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _known(ranks: Sequence[Path]) -> str:
    """Return which ranks have logs, as the end of a message."""
    if not ranks:
        return ""
    first, last = (int(path.stem.removeprefix("rank_")) for path in (ranks[0], ranks[-1]))
    return f"; there are those of {len(ranks)} ranks, {first} to {last}"
