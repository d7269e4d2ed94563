"""A stage that reports its rank and takes part in one collective."""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import ClassVar

from trainer.config import RunConfig
from trainer.engine import collectives
from trainer.errors import EXIT_RESUME, NumericsError
from trainer.stage import Context, Stage


@dataclass(frozen=True)
class Probe(Stage):
    """What to do is ``action``: report, fail, die, hang or wait (for a signal)."""

    name: ClassVar[str] = "probe"
    action: str = "report"
    action_rank: int = 1

    def check(self, config: RunConfig) -> list[str]:
        return ["stage.action=refuse is refused"] if self.action == "refuse" else []

    def run(self, context: Context) -> None:
        total = collectives.sum_over_ranks([float(context.rank)])[0]
        place = {"rank": context.rank, "world_size": context.world_size, "total": total}
        keys = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
        place |= {key: os.environ[key] for key in keys}
        place["mpi4py"] = "mpi4py" in sys.modules
        (context.run_dir / f"rank{context.rank}.json").write_text(json.dumps(place))
        print(f"rank {context.rank} is here", flush=True)
        if self.action == "wait":
            self._wait_for_signal(context)
        if self.action == "fail" and context.rank == self.action_rank:
            raise NumericsError("loss is NaN at step 3")
        if self.action == "die" and context.rank == self.action_rank:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.action in ("fail", "die"):
            collectives.sum_over_ranks([1.0])  # the failing rank never comes

    def _wait_for_signal(self, context: Context) -> None:
        received = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda n, frame: received.append(n))
        (context.run_dir / f"ready{context.rank}").touch()
        while not received:
            time.sleep(0.02)
        time.sleep(0.3)  # saving
        (context.run_dir / f"saved{context.rank}").write_text(str([int(n) for n in received]))
        sys.exit(EXIT_RESUME)
