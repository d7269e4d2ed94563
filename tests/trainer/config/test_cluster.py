"""What a run asks of a cluster, against the profiles of conf/cluster."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import yaml

from launch.compose import CONF, compose_config
from trainer.config import RunConfig, SiteConfig, build
from trainer.config.cluster import (
    check_cluster,
    check_submission,
    format_time,
    host_gb_per_gpu,
    job_gpu,
    parse_time,
    partition_limits,
    time_limit_s,
)
from trainer.errors import ConfigError
from trainer.plan.flops import peak_flops_per_s

T2 = compose_config(["cluster=taiwania2"])
PROFILES = sorted(path.stem for path in (CONF / "cluster").glob("*.yaml"))


def asking(config: RunConfig = T2, precision: str = "auto", **cluster: object) -> list[str]:
    """Return what is wrong with a config that asks for this."""
    engine = replace(config.engine, precision=precision)
    asked = replace(config, engine=engine, cluster=replace(config.cluster, **cluster))
    return check_cluster(asked)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("00:30:00", 1800),
        ("48:00:00", 172800),
        ("2-00:00:00", 172800),
        ("1-24:00:00", None),
        ("00:60:00", None),
        ("00:00:00", None),
        ("30", None),
        ("1:00:00\n", None),
        ("٣:00:00", None),
    ],
)
def test_times(text: str, seconds: int | None) -> None:
    assert parse_time(text) == seconds
    if seconds is not None:
        assert parse_time(format_time(seconds)) == seconds


def test_unknown_partition_lists_those_there_are() -> None:
    [problem] = asking(partition="gp3d")
    assert "cluster.partition=gp3d" in problem and "gtest, gp1d, gp2d, gp4d, express" in problem
    assert "did you mean" in problem


def test_time_and_gpus_within_the_partition() -> None:
    assert asking(partition="gp1d", time="24:00:00", nodes=5) == []
    time, *_ = asking(partition="gp1d", time="1-00:00:01")
    assert "gp1d ends jobs after 24 hours" in time and "gp2d|gp4d|express" in time
    [gpus] = asking(partition="gp1d", nodes=6)
    assert "6*8=48 GPUs: gp1d gives a user 40 at most" in gpus and "=express" in gpus


def test_a_partition_for_large_jobs() -> None:
    nano4 = compose_config(["cluster=nano4"])
    [problem] = asking(nano4, partition="32gpus", nodes=1)
    assert "32gpus is for 16 or more" in problem
    assert asking(nano4, partition="32gpus", nodes=2) == []


def test_no_more_ranks_than_a_node_has_gpus() -> None:
    [problem] = asking(gpus_per_node=16)
    assert "a node of taiwania2 has 8" in problem
    [problem] = asking(compose_config(["cluster=forerunner1"]), gpus_per_node=113)
    assert "112 cores" in problem


def test_bf16_is_refused_where_gpus_do_not_compute_it() -> None:
    [problem] = asking(precision="bf16")
    assert "engine.precision=bf16" in problem and "V100" in problem and "fp16" in problem
    assert asking(precision="fp16") == asking(precision="auto") == []
    assert asking(compose_config(["cluster=nano5"]), precision="bf16", partition="normal") == []


def test_all_problems_at_once() -> None:
    words = ["cluster=taiwania2", "cluster.partition=gp1d", "cluster.time=30:00:00"]
    with pytest.raises(ConfigError) as refused:
        compose_config([*words, "engine.precision=bf16", "cluster.gpus_per_node=9"])
    assert len(str(refused.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("account", "partition", "words"),
    [
        (None, None, "cluster.account=PROJECT"),
        ("mst109001", None, "look like (MST|ENT|ACD|GOV)[0-9]{6}"),
        ("MST109001", "express", "industrial and personal projects"),
        ("MST109001", "gp2d", None),
        ("ENT109001", "express", None),
    ],
)
def test_accounts(account: str | None, partition: str | None, words: str | None) -> None:
    cluster = replace(T2.cluster, account=account, partition=partition)
    problems = check_submission(cluster)
    assert (words is None and not problems) or (words and words in problems[0])


def test_a_machine_without_scheduler_takes_no_jobs() -> None:
    [problem] = check_submission(compose_config([]).cluster)
    assert "cluster=local has no scheduler" in problem and "kuroshio run" in problem


def test_what_a_profile_does_not_know_is_not_checked() -> None:
    unknown = compose_config(["cluster=generic_slurm"])
    asked = {"partition": "any", "time": "30-00:00:00", "nodes": 500, "gpus_per_node": 16}
    assert asking(unknown, precision="bf16", **asked) == []
    assert time_limit_s(unknown.cluster) is None


def test_gpus_of_a_partition_that_differs() -> None:
    nano5 = compose_config(["cluster=nano5"]).cluster
    assert job_gpu(nano5) == ("H100-80GB", 80)
    assert job_gpu(replace(nano5, partition="normal2")) == ("H200-141GB", 141)
    assert time_limit_s(replace(nano5, partition="dev")) == 7200


def test_host_memory_is_the_sites_rule_or_a_share() -> None:
    assert host_gb_per_gpu(T2.cluster.site) == 90
    assert host_gb_per_gpu(compose_config(["cluster=nano5"]).cluster.site) == 250
    assert host_gb_per_gpu(SiteConfig()) is None


@pytest.mark.parametrize("name", PROFILES)
def test_profile_says_where_its_facts_come_from(name: str) -> None:
    site = compose_config([f"cluster={name}"]).cluster.site
    assert site.name == name
    facts = [site.gpu, site.gpu_memory_gb, site.cpus_per_gpu, site.internet, *site.partitions]
    if any(fact is not None for fact in facts):
        assert site.sources
        assert all(re.search(r"commit [0-9a-f]{8}|read 20\d\d", s) for s in site.sources)
    for price in site.prices:
        assert price.per_gpu_hour > 0 and price.source
    if site.gpu is not None:
        assert peak_flops_per_s(site.gpu, "fp16")
        assert (peak_flops_per_s(site.gpu, "bf16") is not None) == ("bf16" in site.precisions)
    if site.default_partition is not None:
        assert site.default_partition in site.partitions


def test_profiles_name_known_keys_only() -> None:
    for name in PROFILES:
        values = yaml.safe_load((CONF / "cluster" / f"{name}.yaml").read_text(encoding="utf-8"))
        problems: list[str] = []
        build(SiteConfig, values["site"], "site", problems)
        assert problems == []


def test_limits_of_an_unlisted_partition_are_unknown() -> None:
    other = replace(T2.cluster, site=replace(T2.cluster.site, partitions={}))
    assert partition_limits(other).max_hours is None
