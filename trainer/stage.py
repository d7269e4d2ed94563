"""What every stage is: a dataclass of hyperparameters with a ``run`` method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from trainer.config import RunConfig
from trainer.lease import Lease


@dataclass(frozen=True)
class Context:
    """Where and as which rank a stage runs.

    Attributes:
        config: of the run.
        run_dir: its folder.
        rank: of this process.
        world_size: number of ranks.
        local_rank: index of the device on its node.
        lease: the right to write into the folder; None where nobody else can.
        time_limit: when the job is ended, in seconds since the epoch; known to rank 0 only.
    """

    config: RunConfig
    run_dir: Path
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    lease: Lease | None = None
    time_limit: float | None = None


class Stage:
    """Base of all stages; a subclass is a dataclass whose fields are its hyperparameters."""

    name: ClassVar[str]
    single_process: ClassVar[bool] = False  # true: runs in one process, without torch.distributed

    def run(self, context: Context) -> None:
        """Do the whole stage, writing into ``context.run_dir``."""
        raise NotImplementedError

    def check(self, config: RunConfig) -> list[str]:
        """Return contradictions between this stage's fields and the rest of the config."""
        return []

    def settle(self, config: RunConfig) -> tuple[RunConfig, list[str]]:
        """Fill in what only the model and the prepared data can tell, before the run is frozen.

        Returns:
            The config, and remarks for the user. Settling it again changes nothing.

        Raises:
            DataError: the data is not prepared.
        """
        return config, []
