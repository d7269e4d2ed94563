"""Ranks compare what they are about to run before they run it."""

from __future__ import annotations

import json
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from launch import ROOT
from launch.local import FORWARDED
from launch.rendezvous import mpi_finalize
from launch.run_folder import plain
from launch.snapshot import hash_code
from trainer.config import RunConfig
from trainer.engine import collectives
from trainer.errors import LostRankError, PortTakenError, RanksDisagreeError, StorageError
from trainer.lease import Lease, lease_path

LATE_S = 10.0
POLL_S = 0.2


def rank_facts(config: RunConfig, run_dir: Path, root: Path = ROOT) -> dict[str, str]:
    """Return what must be equal on all ranks."""
    return {
        "config": json.dumps(plain(config), sort_keys=True),
        "run folder": str(run_dir.resolve()),
        "code": hash_code(root),
    }


def join(timeout_s: int) -> None:
    """Enter the process group named by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Before DeepSpeed is imported, which takes seconds. CPU tensors travel over gloo and CUDA tensors
    over NCCL, so host-side agreements never wait for a device.

    Raises:
        PortTakenError: on rank 0, when another process listens there.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise PortTakenError(
            f"MASTER_PORT={os.environ['MASTER_PORT']} is taken by another process on "
            f"{socket.gethostname()}, so the ranks cannot meet there; give another one "
            "(torchrun --standalone and `kuroshio run` find one themselves)"
        ) from error


@contextmanager
def among_ranks(rank: int, name_lost: Callable[[], str] = str) -> Iterator[None]:
    """Turn the backend's error about a rank that is gone into one line.

    Args:
        rank: of this process.
        name_lost: returns who is gone, empty if nobody knows.

    Raises:
        LostRankError: when a collective inside the block failed because another rank ended.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo/transport" in str(error)):
            raise
        reason = str(error).splitlines()[0].partition(" This is typically")[0]
        with _signals_ignored():
            lost = name_lost()
        who = f"{lost}; so " if lost else ""
        message = f"{who}rank {rank} lost contact with another rank: {reason}"
        raise LostRankError(message, names_rank=bool(lost)) from error


@contextmanager
def _signals_ignored() -> Iterator[None]:
    """Let no launcher cut the block short: it asks the other ranks to leave when one is gone."""
    former = {number: signal.signal(number, signal.SIG_IGN) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def part() -> None:
    """Leave the process group together: a rank that exits first would take the store with it."""
    collectives.barrier()
    dist.destroy_process_group()
    mpi_finalize()


def share_lease(run_dir: Path, lease: Lease | None) -> Lease:
    """Return rank 0's lease on every rank."""
    return Lease(run_dir, collectives.broadcast_int(lease.token if lease else 0))


def refuse_crowding(num_nodes: int, node: str) -> None:
    """Compare where the ranks really are with ``cluster.nodes``; every rank must call this.

    Raises:
        RanksDisagreeError: on every rank, when they are on fewer or more nodes.
    """
    names = collectives.gather_texts(node)
    found = len(set(names))
    if found != num_nodes:
        raise RanksDisagreeError(
            f"the {len(names)} ranks are on {found} nodes ({', '.join(sorted(set(names))[:8])}), "
            f"but cluster.nodes={num_nodes}; give sbatch or srun --nodes={num_nodes} and "
            "--ntasks-per-node, or set cluster.nodes and cluster.gpus_per_node to what it gives"
        )


def refuse_unusable_folder(lease: Lease, rank: int, node: str, wait_s: float = LATE_S) -> None:
    """Let every rank look for the life's lease in its folder, and write there; all must call this.

    On a file system of its own, a node sees another folder, or none, under the same name.

    Args:
        lease: of rank 0, which has just created its file.
        rank: this one.
        node: on which it is.
        wait_s: how late a network file system may show that file.

    Raises:
        StorageError: on every rank, naming the nodes that cannot use the folder, and why.
    """
    seen = _read_late(lease_path(lease.run_dir, lease.token), wait_s)
    problem = _try_to_write(lease.run_dir)
    if rank in collectives.all_ranks_equal(seen):
        problem = "another folder is there than on rank 0's node, or none"
    found = collectives.gather_texts(f"{node}: {problem}" if problem else "")
    if problems := sorted({text for text in found if text}):
        raise StorageError(
            f"run_dir={lease.run_dir} cannot be used on every node:\n  "
            + "\n  ".join(problems)
            + "\ngive a folder on a file system that all nodes share, or leave these nodes out"
        )


def _read_late(path: Path, wait_s: float) -> str:
    """Return a file's text, empty when it does not appear in time or cannot be read."""
    limit = time.monotonic() + wait_s
    while True:
        try:
            return path.read_text(encoding="utf-8")
        except OSError:
            if time.monotonic() > limit:
                return ""
            time.sleep(POLL_S)


def _try_to_write(folder: Path) -> str:
    """Return why nothing can be written into a folder, empty when something can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"kuroshio")
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return ""


def refuse_disagreement(facts: dict[str, str]) -> None:
    """Compare ``facts`` over all ranks; every rank must call this, after joining the others.

    Raises:
        RanksDisagreeError: on every rank, naming the ranks that differ from rank 0 and in what.
    """
    differing = {name: collectives.all_ranks_equal(value) for name, value in facts.items()}
    lines = [
        f"rank {', '.join(map(str, ranks))} differs from rank 0 in {name}"
        for name, ranks in differing.items()
        if ranks
    ]
    if lines:
        raise RanksDisagreeError(
            "\n".join(lines) + "\nstart every rank with the same command, on a shared file system, "
            "from the same checkout"
        )
