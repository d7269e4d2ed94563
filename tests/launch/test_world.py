"""As many ranks as the configuration says, or as the job has."""

from __future__ import annotations

import pytest

from launch.rendezvous import Rendezvous
from launch.world import adopt_world, check_world
from trainer.config import ClusterConfig
from trainer.errors import ConfigError


def test_world_that_contradicts_the_config_is_an_error_naming_both() -> None:
    found = Rendezvous(1, 4, 1, 2, "n1", 1234, "torchrun")
    check_world(found, ClusterConfig(nodes=2, gpus_per_node=2))
    with pytest.raises(ConfigError) as caught:
        check_world(found, ClusterConfig(nodes=1, gpus_per_node=8))
    message = str(caught.value)
    assert "torchrun started 4 ranks" in message and "1*8=8" in message
    assert "cluster.nodes=2 cluster.gpus_per_node=2" in message


@pytest.mark.parametrize(
    ("launcher", "world_size", "local", "expected"),
    [
        ("slurm", 2, 2, (1, 2)),  # one of the two nodes is down
        ("slurm", 8, 2, (4, 2)),
        ("mpi", 4, 4, (1, 4)),
        ("slurm", 3, 2, (2, 2)),  # uneven: for check_world to refuse
        ("plain", 1, 1, (2, 2)),
        ("local", 2, 2, (2, 2)),
    ],
)
def test_a_frozen_config_takes_its_world_from_the_job(
    launcher: str, world_size: int, local: int, expected: tuple[int, int]
) -> None:
    values = {"cluster": {"nodes": 2, "gpus_per_node": 2, "timeout_s": 9}}
    adopt_world(values, Rendezvous(0, world_size, 0, local, "n1", 1234, launcher), {})
    nodes, gpus = expected
    assert values == {"cluster": {"nodes": nodes, "gpus_per_node": gpus, "timeout_s": 9}}


@pytest.mark.parametrize(
    ("num_ranks", "asked", "fitted"),
    [(4, 4, 2), (4, 2, 2), (8, 4, 1), (2, 4, 4), (3, 4, 4)],  # 3: for the batch's check to refuse
)
def test_a_rank_holds_fewer_rows_where_a_step_would_not_divide(
    num_ranks: int, asked: int, fitted: int
) -> None:
    found = Rendezvous(0, num_ranks, 0, num_ranks, "n1", 1234, "slurm")
    values = {
        "cluster": {"nodes": 1, "gpus_per_node": 1},
        "loop": {"global_batch_tokens": 8 * 64, "micro_batch_size": asked},
        "data": {"max_length": 64},
    }
    adopt_world(values, found, {})
    assert values["loop"]["micro_batch_size"] == fitted


def test_the_only_task_of_a_step_is_one_node() -> None:
    alone = Rendezvous(0, 1, 0, 1, "127.0.0.1", 1234, "plain")
    values = {"cluster": {"nodes": 2, "gpus_per_node": 2}}
    adopt_world(values, alone, {"SLURM_STEP_NODELIST": "n1"})
    assert values == {"cluster": {"nodes": 1, "gpus_per_node": 2}}
