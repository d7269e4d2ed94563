"""What a run asks of a cluster, checked against the facts of its site."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from trainer.config.build import nearest
from trainer.config.schema import ClusterConfig, PartitionConfig, RunConfig, SiteConfig

TIME = re.compile(
    r"(?:(?P<days>\d{1,3})-)?(?P<hours>\d{1,3}):(?P<minutes>\d{2}):(?P<seconds>\d{2})", re.ASCII
)


def parse_time(text: str) -> int | None:
    """Return the seconds of a Slurm time ``D-HH:MM:SS`` or ``HH:MM:SS``; None if it is none."""
    match = TIME.fullmatch(text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    fits = minutes < 60 and seconds < 60 and (match["days"] is None or hours < 24)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    return total if fits and total else None


def format_time(seconds: float) -> str:
    """Return whole ``seconds`` as Slurm writes a time, ``D-HH:MM:SS``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24}-{hours % 24:02}:{minutes:02}:{rest:02}"


def partition_name(cluster: ClusterConfig) -> str | None:
    """Return the partition a job goes to; None where only the scheduler knows its default."""
    return cluster.partition or cluster.site.default_partition


def partition_limits(cluster: ClusterConfig) -> PartitionConfig:
    """Return the limits of the job's partition; all unknown where the profile has none."""
    return cluster.site.partitions.get(partition_name(cluster) or "", PartitionConfig())


def one_gpu(cluster: ClusterConfig) -> ClusterConfig:
    """Return where a job of one GPU has its place, for a cluster that others of a run ask for.

    Partitions for many GPUs keep such a job waiting for ever, so it goes to the first other one
    with the same GPUs; it need not be named, since what it does is short.
    """
    single = replace(cluster, nodes=1, gpus_per_node=1)
    own = partition_limits(cluster)
    if own.min_gpus <= 1:
        return single
    fits = (
        name
        for name, other in cluster.site.partitions.items()
        if other.min_gpus <= 1
        and other.who == own.who
        and (other.gpu, other.arch) == (own.gpu, own.arch)
    )
    single = replace(single, partition=next(fits, cluster.partition))
    most = partition_limits(single).max_hours
    asked = parse_time(cluster.time) if cluster.time else None
    is_too_long = asked is not None and most is not None and asked > most * 3600
    return replace(single, time=None) if is_too_long else single


def time_limit_s(cluster: ClusterConfig) -> int | None:
    """Return the seconds a job may take: asked for, else its partition's limit; None if unknown."""
    if cluster.time is not None:
        return parse_time(cluster.time)
    hours = partition_limits(cluster).max_hours
    return None if hours is None else round(hours * 3600)


def job_gpu(cluster: ClusterConfig) -> tuple[str | None, float | None]:
    """Return name and memory in GB of the GPUs of the job's partition; None where unknown."""
    limits, site = partition_limits(cluster), cluster.site
    if limits.gpu is not None and limits.gpu != site.gpu:
        return limits.gpu, limits.gpu_memory_gb
    return site.gpu, limits.gpu_memory_gb or site.gpu_memory_gb


def host_gb_per_gpu(site: SiteConfig) -> float | None:
    """Return the host memory for each GPU: the site's rule, else its share of a node."""
    if site.memory_gb_per_gpu is not None or site.memory_gb_per_node is None:
        return site.memory_gb_per_gpu
    return site.memory_gb_per_node / site.gpus_per_node if site.gpus_per_node else None


def check_cluster(config: RunConfig) -> list[str]:
    """Return what the run asks of its machines that they do not have."""
    cluster = config.cluster
    site = cluster.site
    problems = [*_check_partition(cluster), *_check_time(cluster), *_check_ranks(cluster)]
    if site.precisions and config.engine.precision not in ("auto", *site.precisions):
        gpu = job_gpu(cluster)[0] or "its GPUs"
        problems.append(
            f"engine.precision={config.engine.precision}: {gpu} of cluster={site.name} computes "
            f"{', '.join(site.precisions)}; use engine.precision=fp16, or auto, which takes the "
            "best of them"
        )
    return problems


def check_submission(cluster: ClusterConfig) -> list[str]:
    """Return what a job of the scheduler needs besides what every run needs."""
    site, account = cluster.site, cluster.account
    problems = []
    if site.scheduler != "slurm":
        problems.append(
            f"cluster={site.name} has no scheduler to submit to; name one with cluster=NAME "
            "(conf/cluster lists them), or use `kuroshio run`"
        )
    if account is None and site.account_required:
        example = f" (it looks like {site.account_pattern})" if site.account_pattern else ""
        problems.append(
            f"cluster.account=null: jobs on {site.name} are paid by a project{example}; give "
            "cluster.account=PROJECT"
        )
    limits, name = partition_limits(cluster), partition_name(cluster)
    theirs = limits.account_pattern
    if account is not None and theirs and not re.fullmatch(theirs, account):
        problems.append(
            f"cluster.partition={name} is for {limits.who}, not for cluster.account={account}; use "
            "another partition"
        )
    pattern = site.account_pattern
    if account is not None and pattern and not re.fullmatch(pattern, account):
        problems.append(
            f"cluster.account={account!r}: accounts of {site.name} look like {pattern}; "
            "for another kind, set cluster.site.account_pattern=null"
        )
    return problems


def _check_partition(cluster: ClusterConfig) -> Iterator[str]:
    site, name = cluster.site, partition_name(cluster)
    if site.partitions and name is not None and name not in site.partitions:
        yield (
            f"cluster.partition={name}: {site.name} has {', '.join(site.partitions)}"
            f"{nearest(name, site.partitions)}"
        )
    limits, gpus = partition_limits(cluster), cluster.nodes * cluster.gpus_per_node
    if site.gpus_per_node == 0:
        return  # ranks on CPU
    asked = f"cluster.nodes*cluster.gpus_per_node={cluster.nodes}*{cluster.gpus_per_node}={gpus}"
    if limits.max_gpus is not None and gpus > limits.max_gpus:
        roomy = [n for n, p in site.partitions.items() if p.max_gpus and p.max_gpus >= gpus]
        yield (
            f"{asked} GPUs: {name} gives a user {limits.max_gpus} at most; ask for fewer"
            + (f", or cluster.partition={'|'.join(roomy)}" if roomy else "")
        )
    if gpus < limits.min_gpus:
        yield f"{asked} GPUs: {name} is for {limits.min_gpus} or more; use another partition"


def _check_time(cluster: ClusterConfig) -> Iterator[str]:
    if cluster.time is None:
        return
    seconds = parse_time(cluster.time)
    if seconds is None:
        yield (
            f"cluster.time={cluster.time!r}: expected D-HH:MM:SS or HH:MM:SS, such as 1-12:00:00 "
            "for a day and a half"
        )
        return
    limits, name = partition_limits(cluster), partition_name(cluster)
    if limits.max_hours is not None and seconds > limits.max_hours * 3600:
        partitions = cluster.site.partitions.items()
        longer = [n for n, p in partitions if p.max_hours and p.max_hours * 3600 >= seconds]
        yield (
            f"cluster.time={cluster.time}: {name} ends jobs after {limits.max_hours:g} hours; ask "
            "for less (the job goes on by itself after its limit)"
            + (f", or cluster.partition={'|'.join(longer)}" if longer else "")
        )


def _check_ranks(cluster: ClusterConfig) -> Iterator[str]:
    site, ranks = cluster.site, cluster.gpus_per_node
    other = job_gpu(cluster)[0] != site.gpu  # the site's node is not this partition's
    if site.gpus_per_node and not other and ranks > site.gpus_per_node:
        yield (
            f"cluster.gpus_per_node={ranks}: a node of {site.name} has {site.gpus_per_node}; use "
            f"cluster.gpus_per_node={site.gpus_per_node} and more cluster.nodes"
        )
    if site.cpus_per_node and ranks > site.cpus_per_node:
        yield (
            f"cluster.gpus_per_node={ranks}: a node of {site.name} has {site.cpus_per_node} cores; "
            "use fewer ranks a node"
        )
