"""How many ranks there are: what the configuration says, and what the launcher started."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from launch.rendezvous import Rendezvous
from trainer.config import ClusterConfig, fit_micro_batch_size
from trainer.errors import ConfigError

LOG = logging.getLogger(__name__)


def adopt_world(values: dict[str, Any], found: Rendezvous, environ: Mapping[str, str]) -> None:
    """Set a frozen config's nodes and ranks a node to what the job has; they may change.

    A job may start on fewer nodes than the run was frozen with (``--nodes=1-2``, one is down), or a
    user resumes it in a job of another size. A launcher that deals ranks unevenly changes nothing.
    """
    cluster = values.get("cluster")
    world = job_world(found, environ)
    if world is None or not isinstance(cluster, dict):
        return
    old = {key: cluster.get(key) for key in world}
    if old != world and found.rank == 0:
        LOG.warning("the run has %s, this job %s: it goes on with those", old, world)
    cluster |= world
    if old != world:
        _fit_rows(values, found)


def _fit_rows(values: dict[str, Any], found: Rendezvous) -> None:
    """Let ranks hold fewer rows at once where a step would not divide; results stay the same."""
    loop, data = values.get("loop"), values.get("data")
    if not isinstance(loop, dict) or not isinstance(data, dict) or data.get("content") == "prompts":
        return
    keys = ((loop, "global_batch_tokens"), (data, "max_length"), (loop, "micro_batch_size"))
    sizes = [section.get(key) for section, key in keys]
    whole = [size for size in sizes if isinstance(size, int) and size > 0]
    if len(whole) < len(sizes):
        return  # for the checks of the whole configuration to name
    num_tokens, max_length, asked = whole
    size = fit_micro_batch_size(num_tokens // max_length, asked, found.world_size)
    if size in (None, asked):
        return
    if found.rank == 0:
        LOG.warning(
            "loop.micro_batch_size=%d does not divide a step over %d ranks: it goes on with %d",
            asked, found.world_size, size,
        )  # fmt: skip
    loop["micro_batch_size"] = size


def job_world(found: Rendezvous, environ: Mapping[str, str]) -> dict[str, int] | None:
    """Return ``nodes`` and ``gpus_per_node`` of the job, as far as it says; None for nothing."""
    if found.launcher == "plain":
        # The only task of its step: as many ranks as the run has on a node, but one node.
        return {"nodes": 1} if "SLURM_STEP_NODELIST" in environ else None
    per_node = found.local_world_size
    if found.launcher == "local" or found.world_size % per_node:
        return None
    return {"nodes": found.world_size // per_node, "gpus_per_node": per_node}


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
