"""Rank, world and address from every launcher's environment; errors instead of guesses."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from launch.rendezvous import (
    Rendezvous,
    detect,
    device_index,
    first_slurm_host,
    free_port,
    mpi_barrier,
    mpi_place,
)
from trainer.errors import ConfigError

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "gn1001", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x",
}  # fmt: skip
SLURM = {
    "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "gn[1001-1002]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_JOB_ID": "812345",
}  # fmt: skip


def first_host(nodelist: str) -> str:
    assert nodelist == "gn[1001-1002]"
    return "gn1001"


def no_scontrol(nodelist: str) -> str:
    raise AssertionError("asked scontrol")


def mpi_says(rank: int, world_size: int) -> Rendezvous:
    return Rendezvous(rank, world_size, rank, world_size, "127.0.0.1", 4000, "mpi")


def test_torchrun() -> None:
    assert detect(TORCHRUN) == Rendezvous(3, 4, 1, 2, "gn1001", 29500, "torchrun")


def test_deepspeed_names_its_local_world_local_size() -> None:
    environ = {**TORCHRUN, "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
    for key in ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"):
        del environ[key]
    assert detect(environ) == Rendezvous(3, 4, 1, 2, "gn1001", 29500, "deepspeed")


@pytest.mark.parametrize(
    "key", ["WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
)
def test_half_an_environment_is_an_error_naming_what_is_missing(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}.* is not; set"):
        detect({k: v for k, v in TORCHRUN.items() if k != key})


def test_world_size_without_rank_is_an_error() -> None:
    with pytest.raises(ConfigError, match="WORLD_SIZE=2 is set but RANK is not"):
        detect({"WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    "change",
    [{"RANK": "4"}, {"LOCAL_RANK": "2"}, {"MASTER_PORT": "70000"}, {"LOCAL_WORLD_SIZE": "8"}],
)
def test_impossible_numbers_are_an_error(change: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="contradicts itself"):
        detect({**TORCHRUN, **change})


@pytest.mark.parametrize("value", ["-1", "one", "1.0"])
def test_numbers_that_are_none_are_an_error(value: str) -> None:
    with pytest.raises(ConfigError, match="RANK="):
        detect({**TORCHRUN, "RANK": value})


def test_slurm_takes_the_address_from_the_nodes_and_the_port_from_the_job() -> None:
    assert detect(SLURM, first_host) == Rendezvous(2, 4, 0, 2, "gn1001", 22345, "slurm")


def test_slurm_prefers_the_job_scripts_own_address() -> None:
    found = detect({**SLURM, "MASTER_ADDR": "ib-gn1001", "MASTER_PORT": "1234"}, no_scontrol)
    assert (found.master_addr, found.master_port) == ("ib-gn1001", 1234)


@pytest.mark.parametrize(
    ("node", "tasks", "local_world_size"),
    [("0", "2(x2),1", 2), ("1", "2(x2),1", 2), ("2", "2(x2),1", 1), ("1", "3,1", 1)],
)
def test_slurm_nodes_may_hold_different_numbers(
    node: str, tasks: str, local_world_size: int
) -> None:
    environ = {**SLURM, "SLURM_NODEID": node, "SLURM_STEP_TASKS_PER_NODE": tasks}
    assert detect(environ, first_host).local_world_size == local_world_size


def test_slurm_without_a_host_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no MASTER_ADDR"):
        detect(SLURM, lambda nodelist: "")


def test_scontrol_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="scontrol show hostnames gn"):
        first_slurm_host("gn[1001-1002]")


@pytest.mark.parametrize(
    "environ",
    [
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # the batch script
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"},  # salloc's shell
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"},  # srun --pty bash
        {},
    ],
)
def test_a_process_alone_is_a_world_of_one(environ: dict[str, str]) -> None:
    found = detect(environ, no_scontrol)
    assert (found.rank, found.world_size, found.launcher) == (0, 1, "plain")
    assert found.master_addr == "127.0.0.1" and 1023 < found.master_port < 65536


@pytest.mark.parametrize(
    "environ",
    [
        {"OMPI_COMM_WORLD_RANK": "1"},
        {"PMI_RANK": "1", "PMI_SIZE": "2"},
        {"PMIX_RANK": "1"},
        {**SLURM, "OMPI_COMM_WORLD_RANK": "1"},  # mpiexec inside a job: SLURM_* are the daemon's
        {**SLURM, "PMI_RANK": "1", "PMI_SIZE": "2"},
    ],
)
def test_mpi_is_asked_in_an_mpi_environment(environ: dict[str, str]) -> None:
    assert detect(environ, no_scontrol, lambda env: mpi_says(1, 2)) == mpi_says(1, 2)


def test_srun_with_pmix_needs_no_mpi_library() -> None:
    def no_mpi(environ: object) -> Rendezvous:
        raise AssertionError("asked MPI")

    assert detect({**SLURM, "PMIX_RANK": "2"}, first_host, no_mpi).launcher == "slurm"


def test_torchrun_inside_slurm_wins() -> None:
    assert detect({**SLURM, **TORCHRUN}, no_scontrol).launcher == "torchrun"


def test_without_an_mpi_environment_mpi4py_is_never_imported() -> None:
    assert mpi_place({}) == (0, 1)
    mpi_barrier({})
    assert "mpi4py.MPI" not in sys.modules


def test_export_writes_everything_deepspeed_looks_for() -> None:
    environ = {"LOCAL_SIZE": "2", "OTHER": "kept"}
    Rendezvous(3, 4, 1, 2, "gn1001", 29500, "slurm").export(environ)
    assert environ == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gn1001", "MASTER_PORT": "29500", "OTHER": "kept",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("visible", "local_rank", "index"), [("3", 2, 0), ("4,5,6", 2, 2), ("", 2, 2), (None, 1, 1)]
)
def test_device_index(visible: str | None, local_rank: int, index: int) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert device_index(local_rank, environ) == index


def test_more_ranks_than_devices_is_an_error() -> None:
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=0,1 has 2"):
        device_index(2, {"CUDA_VISIBLE_DEVICES": "0,1"})


def test_a_free_port_is_none_that_connections_are_given() -> None:
    given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = {free_port() for _ in range(20)}
    assert len(ports) > 1 and max(ports) < min(given, 30000)
    with socket.socket() as one:
        one.bind(("127.0.0.1", min(ports)))  # each can be listened at


def test_a_machine_without_a_free_port_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        monkeypatch.setattr("random.SystemRandom.sample", lambda self, ports, count: [port])
        with pytest.raises(ConfigError, match="MASTER_PORT"):
            free_port()
