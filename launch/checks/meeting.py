"""Ranks find each other through a store on rank 0, and go on without those who stay away.

No process group of all ranks is made for that: it would hang as a whole for one that is missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from datetime import timedelta

import torch.distributed as dist

from launch.checks.files import skew_between

POLL_S = 0.005  # it also bounds how well clocks are compared


class Meeting:
    """The store, and rank 0's part of keeping the others together.

    Args:
        store: reachable by every rank.
        rank, world_size: of this rank.
        wait_s: how long rank 0 waits for a silent rank.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, wait_s: float) -> None:
        self.store, self.rank, self.wait_s = store, rank, wait_s
        self.present = list(range(world_size))  # those that still answer; rank 0 decides

    def gather(self) -> tuple[float, float] | None:
        """Learn who is here; return this clock minus rank 0's, and the uncertainty.

        Raises:
            RuntimeError: rank 0 is gone, or went on without this rank.
        """
        if self.rank == 0:
            self._collect("here", self.wait_s, self._tell_time)
            self.store.set("present", json.dumps(self.present))
            return None
        start = time.time()
        self.store.set(f"here/{self.rank}", "")
        answer = float(self._get(f"clock/{self.rank}", self.wait_s))
        offset, uncertainty = skew_between(start, answer, time.time())
        self.present = json.loads(self._get("present", self.wait_s))
        if self.rank not in self.present:
            raise RuntimeError("rank 0 went on without this rank, which came too late")
        return -offset, uncertainty

    def agree(self, name: str, said: str, wait_s: float) -> dict[int, str]:
        """Return what every rank said, once all did; ranks that died are no longer present."""
        self.store.set(f"{name}/{self.rank}", said)
        if self.rank == 0:
            words = {0: said} | self._collect(name, wait_s, lambda rank: None)
            self.store.set(f"{name}/all", json.dumps(words))
        answers = json.loads(self._get(f"{name}/all", wait_s))
        self.present = [rank for rank in self.present if str(rank) in answers]
        return {int(rank): word for rank, word in answers.items()}

    def part(self) -> None:
        """Leave; rank 0, which holds the store, leaves last."""
        self.store.set(f"gone/{self.rank}", "")
        if self.rank == 0:
            self._collect("gone", self.wait_s, lambda rank: None)

    def _tell_time(self, rank: int) -> None:
        self.store.set(f"clock/{rank}", repr(time.time()))

    def _collect(self, name: str, wait_s: float, answer: Callable[[int], None]) -> dict[int, str]:
        """Wait on rank 0 until all others set ``name``; those that do not are present no more."""
        words: dict[int, str] = {}
        missing = set(self.present) - {0}
        end = time.monotonic() + wait_s
        while missing and time.monotonic() < end:
            for rank in self._ready(name, missing):
                answer(rank)
                words[rank] = self.store.get(f"{name}/{rank}").decode()
                missing.discard(rank)
            time.sleep(POLL_S)
        self.present = [rank for rank in self.present if rank not in missing]
        return words

    def _ready(self, name: str, ranks: Iterable[int]) -> list[int]:
        return [rank for rank in sorted(ranks) if self.store.check([f"{name}/{rank}"])]

    def _get(self, key: str, wait_s: float) -> str:
        """Return rank 0's word, which itself waits ``wait_s`` for the last of the others."""
        self.store.wait([key], timedelta(seconds=wait_s + 2 * self.wait_s))
        return str(self.store.get(key).decode())
