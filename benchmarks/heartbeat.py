"""What heartbeats cost: a beat, a rank's file, the look at all ranks. Give the folder of your runs.

python benchmarks/heartbeat.py --folder /work/$USER/runs
"""

from __future__ import annotations

import argparse
import os
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path

from trainer import heartbeat
from trainer.heartbeat import Beat

NUM_RANKS = 64


def best_us(call: Callable[[], object], number: int) -> float:
    """Return the microseconds of a call in the best of seven rounds."""
    return min(timeit.repeat(call, number=number, repeat=7)) / number * 1e6


def enter_phase() -> None:
    """Go in and out of a phase."""
    with heartbeat.phase("step", 1):
        pass


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    last = Beat(0, "n1", os.getpid(), 1, 1, 1, "step", 0.0, "", False, 0.0)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        run_dir = Path(name)
        paths = [heartbeat.start_files(run_dir, 1, rank) for rank in range(NUM_RANKS)]
        for path in paths:
            heartbeat.write_beat(path, last)
        rows = {
            "a beat": best_us(heartbeat.beat, 10_000),
            "a phase": best_us(enter_phase, 10_000),
            "where the main thread is": best_us(heartbeat.find_main_thread, 1000),
            "a rank's file": best_us(lambda: heartbeat.write_beat(paths[0], last), 200),
            f"reading {NUM_RANKS} files": best_us(
                lambda: heartbeat.read_beats(run_dir, 1, NUM_RANKS), 10
            ),
        }
    for what, microseconds in rows.items():
        print(f"{what:26} {microseconds:10.1f} µs")


if __name__ == "__main__":
    main()
