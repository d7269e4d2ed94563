"""Variants that take turns: each in processes of its own, all alive at once, one at work.

So what else the machine does meets them alike. The parent holds a ``RankGroup`` for each variant,
every rank a ``Turns``. A rank needs torch and this file only, which may be another environment's.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

REPORT = "report "
PER_TURN = ("wall_s", "cpu_s", "tokens", "targets", "peak_mb")


class RankGroup:
    """The processes of one variant, which work only in their turns."""

    def __init__(
        self, name: str, command: Sequence[str], environ: Mapping[str, str], folder: Path
    ) -> None:
        """Start one process a rank: as many as ``environ``'s WORLD_SIZE.

        Args:
            name: of the variant.
            command: what to start; the rank is in the environment.
            environ: additions to this process's environment.
            folder: for the logs.
        """
        self.name = name
        self.reports: list[list[dict[str, Any]]] = []
        num_ranks = int(environ.get("WORLD_SIZE", 1))
        self.logs = [folder / f"{name}.{rank}.log" for rank in range(num_ranks)]
        self.ranks = [
            subprocess.Popen(
                command,
                env={**os.environ, **environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.logs[rank].open("w"),
                text=True,
            )
            for rank in range(num_ranks)
        ]

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.ranks:
            process.kill()
            process.wait()

    def take_turn(self, count: bool) -> None:
        """Let all ranks do their steps; keep what they report if it is to ``count``."""
        self._tell("go")
        reports = [self._hear(rank) for rank in range(len(self.ranks))]
        if count:
            self.reports.append(reports)

    def finish(self) -> dict[str, Any]:
        """Return the figures over all turns."""
        wall = [max(report["wall_s"] for report in turn) for turn in self.reports]
        cpu = [sum(report["cpu_s"] for report in turn) for turn in self.reports]
        tokens = [sum(report["tokens"] for report in turn) for turn in self.reports]
        targets = [sum(report["targets"] for report in turn) for turn in self.reports]
        last = self.reports[-1]
        return {
            "tokens_per_s": median_rate(tokens, wall),
            "tokens_per_cpu_s": median_rate(tokens, cpu),
            "targets_per_s": median_rate(targets, wall),
            "targets_per_cpu_s": median_rate(targets, cpu),
            "peak_mb": max(report["peak_mb"] for report in last),
            "turn_wall_s": wall,
            "turn_cpu_s": cpu,
            "turn_targets": targets,
            **{key: last[0][key] for key in last[0] if key not in PER_TURN},
        }

    def _tell(self, word: str) -> None:
        for rank, process in enumerate(self.ranks):
            assert process.stdin is not None
            try:
                process.stdin.write(f"{word}\n")
                process.stdin.flush()
            except BrokenPipeError:
                raise SystemExit(self._last_words(rank)) from None

    def _hear(self, rank: int) -> dict[str, Any]:
        stdout = self.ranks[rank].stdout
        assert stdout is not None
        for line in stdout:  # progress lines go there too
            if line.startswith(REPORT):
                report: dict[str, Any] = json.loads(line.removeprefix(REPORT))
                return report
        raise SystemExit(self._last_words(rank))

    def _last_words(self, rank: int) -> str:
        return f"{self.name}, rank {rank} ended:\n{self.logs[rank].read_text()[-5000:]}"


class Turns:
    """A rank's side of the turns: waits for its go, measures, reports.

    Add what a step trains on to ``tokens`` (without padding) and ``targets``.
    """

    def __init__(self, steps: int, device: torch.device) -> None:
        """Note what memory is in use before the model is made."""
        self.steps, self.device, self.started = steps, device, False
        self.tokens = self.targets = 0
        self.wall = self.cpu = 0.0
        self.floor = start_peak(device)

    def begin_step(self, step: int, facts: Callable[[], dict[str, Any]]) -> None:
        """Report the last turn, ``facts`` with it, and wait for the next one if it is due.

        Args:
            step: from 0.
            facts: called when the clock has stopped.
        """
        if step % self.steps:
            return
        if self.started:
            synchronize(self.device)
            report = {
                "wall_s": time.perf_counter() - self.wall,
                "cpu_s": time.process_time() - self.cpu,
                "tokens": self.tokens,
                "targets": self.targets,
                "peak_mb": (read_peak(self.device) - self.floor) / 1e6,
            }
            print(f"{REPORT}{json.dumps(report | facts())}", flush=True)
        if not sys.stdin.readline():
            raise SystemExit  # the parent is gone
        self.started = True
        self.tokens = self.targets = 0
        self.wall, self.cpu = time.perf_counter(), time.process_time()


def take_turns(groups: Sequence[RankGroup], num_turns: int) -> dict[str, dict[str, Any]]:
    """Let all variants work in alternation, a turn to warm up first; return their figures."""
    for turn in range(num_turns + 1):
        for group in groups:
            group.take_turn(count=turn > 0)
    return {group.name: group.finish() for group in groups}


def median_rate(amounts: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the median over turns of amount / seconds."""
    return statistics.median(a / s for a, s in zip(amounts, seconds, strict=True))


def time_ratio(bare: Sequence[float], ours: Sequence[float]) -> float:
    """Return the median over turns of bare time / our time, each turn beside its neighbour."""
    return median_rate(bare, ours)


def synchronize(device: torch.device) -> None:
    """Wait for the GPU; a CPU has nothing to wait for."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def start_peak(device: torch.device) -> int:
    """Reset the peak and return the bytes in use now."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS; proc(5)
    return read_peak(device)


def read_peak(device: torch.device) -> int:
    """Return the most bytes in use since ``start_peak``."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
