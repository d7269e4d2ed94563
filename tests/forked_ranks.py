"""Run lives of runs whose ranks are forked from a process that has imported everything once.

``python forked_ranks.py FILE``; started by the tests (``training_support.run_chains``), not
collected. FILE holds a list of chains; a chain is a list of lives, one after another, each
{"num_ranks": …, "scenarios": […], "code": what its ranks are to end with}. Importing torch and
DeepSpeed takes a rank seconds, and a fork none, so a kill may be a real one in every life. What the
lives ended with goes to FILE.codes: a list for each chain, which ends with the first life that did
not end as it was to.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import scenarios

from launch.rendezvous import free_port
from trainer.errors import KuroshioError

PR_SET_PDEATHSIG = 1  # Linux: what a process gets when its parent dies
AT_ONCE = 2  # chains; a rank is one thread
LIFE_S = 240.0
GRACE_S = 30.0  # for the others once a rank has failed
USED = ("transformers.models.llama.modeling_llama", "peft", "bitsandbytes", "torch.optim.adamw")


class Life:
    """The ranks of one life, from their start to their end."""

    def __init__(self, life: dict[str, Any], path: Path) -> None:
        path.write_text(json.dumps(life["scenarios"]))
        port, num = free_port(), life["num_ranks"]
        self.ranks = [fork_rank(rank, num, port, path) for rank in range(num)]
        self.codes: dict[int, int] = {}
        self.limit = time.monotonic() + LIFE_S

    def code(self) -> int | None:
        """Return what the ranks ended with, None while some go on; one that failed ends all."""
        for pid in self.ranks:
            if pid not in self.codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                self.codes[pid] = os.waitstatus_to_exitcode(found[1])
                if self.codes[pid]:
                    self.limit = min(self.limit, time.monotonic() + GRACE_S)
        codes = self.codes.values()
        if -signal.SIGKILL in codes or time.monotonic() > self.limit:
            self.end()
            return -signal.SIGKILL if -signal.SIGKILL in codes else next(filter(None, codes), 124)
        if len(codes) < len(self.ranks):
            return None
        return next(filter(None, codes), 0)

    def end(self) -> None:
        """Kill and reap the ranks that are left."""
        for pid in self.ranks:
            if pid not in self.codes:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def fork_rank(rank: int, num_ranks: int, port: int, path: Path) -> int:
    """Start a rank of a life; return its process."""
    pid = os.fork()
    if pid:
        return pid
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    log = os.open(path.with_suffix(f".{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    run_rank(path)


def run_rank(path: Path) -> NoReturn:
    """Run the scenarios; end as a run's rank does."""
    code = 1
    try:
        scenarios.main(str(path))
    except KuroshioError as error:
        traceback.print_exc()
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def follow(number: int, chain: list[dict[str, Any]], folder: Path) -> Iterator[list[int]]:
    """Let a chain's lives follow one another; yield, again and again, what they ended with."""
    codes: list[int] = []
    for index, each in enumerate(chain):
        life = Life(each, folder / f"chain_{number}_life_{index}.json")
        try:
            while (code := life.code()) is None:
                yield codes
        except GeneratorExit:
            life.end()
            raise
        codes.append(code)
        if code != each["code"]:
            break
    yield codes


def main(path: Path) -> None:
    for name in USED:
        importlib.import_module(name)
    assert threading.active_count() == 1, "a fork takes no other thread along"
    chains = json.loads(path.read_text())
    waiting = [(n, follow(n, chain, path.parent)) for n, chain in enumerate(chains)]
    results: dict[int, list[int]] = {}
    going = [waiting.pop(0) for _ in range(min(AT_ONCE, len(waiting)))]
    while going:
        for number, chain in list(going):
            before = results.get(number)
            try:
                results[number] = list(next(chain))
            except StopIteration:
                assert before is not None
                going.remove((number, chain))
                going += [waiting.pop(0)] if waiting else []
        time.sleep(0.02)
    path.with_suffix(".codes").write_text(json.dumps([results[n] for n in range(len(chains))]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
