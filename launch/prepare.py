"""``kuroshio prepare``: tokenise a run's sources before it starts."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launch import run_folder
from launch.file_modes import private_files
from launch.graph import lineage
from launch.rendezvous import mpi_barrier, mpi_place
from trainer.config import RunConfig, load_config
from trainer.errors import ConfigError, DataError, KuroshioError

if TYPE_CHECKING:
    from rich.console import RenderableType


def main(config: RunConfig, check: bool = False) -> None:
    """Prepare the sources of ``config`` together with the other MPI ranks, if there are any.

    Rank 0 prints a table of the sources.

    Args:
        config: names the sources and the tokenizer.
        check: only look at the sources and say what would come of them.

    Raises:
        ConfigError: no source, or no tokenizer.
        DataError: unreadable input or too many bad rows.
        StorageError: the store cannot be written.
    """
    from trainer.data.prepared.prepare import prepare
    from trainer.data.prepared.summary import summarise

    rank, world_size = mpi_place(os.environ)
    logging.basicConfig(format=f"%(levelname)s rank {rank}: %(message)s")
    logging.getLogger("trainer").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    tokenizer = tokenizer_path(config)
    if check:
        _check(config, tokenizer, rank)
        return
    try:
        with private_files(config.cluster.share_with_group):
            store = prepare(
                config.data,
                tokenizer,
                rank=rank,
                world_size=world_size,
                barrier=lambda: mpi_barrier(os.environ),
            )
    except KuroshioError as error:
        if world_size == 1:
            raise
        # The other ranks wait for this one. mpiexec ends them when a process leaves without
        # MPI_Finalize, which a normal exit would call, and wait in.
        print(f"kuroshio: rank {rank}: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)
    if rank == 0:
        _print(summarise(store, config.data))


def read_frozen(path: Path) -> RunConfig:
    """Return the config of a run folder, whose parents in a pipeline must be as they should.

    Raises:
        ConfigError: what is wrong with it, or with a parent of its step.
        CheckpointError: the file is missing or damaged.
    """
    lineage.begin_run(str(path.absolute().parent))
    return load_config(run_folder.read(path))


def _check(config: RunConfig, tokenizer: str, rank: int) -> None:
    from trainer.data.prepared.check import check

    if rank:
        return  # one process is enough to look
    found = check(config.data, tokenizer)
    _print(found.report)
    if found.problems:
        raise DataError("\n".join(found.problems))


def _print(report: RenderableType) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a log file has no width
    console.print(report, markup=False)


def ensure_prepared(config: RunConfig) -> None:
    """Prepare what a run on this machine still lacks, before its ranks start.

    Raises:
        ConfigError: no source, or no tokenizer.
        DataError: unreadable input or too many bad rows.
        StorageError: the store cannot be written.
    """
    from trainer.data.prepared import prepare

    prepare.ensure_prepared(config.data, tokenizer_path(config))


def tokenizer_path(config: RunConfig) -> str:
    """Return the tokenizer of a run: its own, else the model folder's.

    Raises:
        ConfigError: neither is given.
    """
    path = config.tokenizer.path or config.model.path
    if path is None:
        raise ConfigError(
            "tokenizer.path and model.path are null, so there is no tokenizer to prepare data "
            "with; give tokenizer=file tokenizer.path=PATH"
        )
    return path
