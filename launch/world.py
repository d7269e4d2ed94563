"""How many ranks there are: what the configuration says, and what the launcher started."""

from __future__ import annotations

import logging
from typing import Any

from launch.rendezvous import Rendezvous
from trainer.config import ClusterConfig
from trainer.errors import ConfigError

LOG = logging.getLogger(__name__)


def adopt_world(values: dict[str, Any], found: Rendezvous) -> None:
    """Set a frozen config's nodes and ranks a node to what the job has; they may change.

    A job may start on fewer nodes than the run was frozen with (``--nodes=1-2``, one is down), or a
    user resumes it in a job of another size. A launcher that deals ranks unevenly changes nothing.
    """
    per_node, cluster = found.local_world_size, values.get("cluster")
    if found.launcher in ("plain", "local") or not isinstance(cluster, dict):
        return
    if found.world_size % per_node:
        return
    world = {"nodes": found.world_size // per_node, "gpus_per_node": per_node}
    old = {key: cluster.get(key) for key in world}
    if old != world and found.rank == 0:
        LOG.warning("the run has %s, this job %s: it goes on with those", old, world)
    cluster |= world


def check_world(found: Rendezvous, cluster: ClusterConfig) -> None:
    """Raise ConfigError unless the launcher started as many ranks as the config says."""
    asked = cluster.nodes * cluster.gpus_per_node
    if found.world_size != asked:
        per_node = found.local_world_size
        raise ConfigError(
            f"{found.launcher} started {found.world_size} ranks, but cluster.nodes*"
            f"cluster.gpus_per_node={cluster.nodes}*{cluster.gpus_per_node}={asked}; set "
            f"cluster.nodes={max(1, found.world_size // per_node)} "
            f"cluster.gpus_per_node={per_node}, or start {asked} ranks"
        )
