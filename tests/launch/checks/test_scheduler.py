"""Slurm's words, and what they mean for a job."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launch.checks.scheduler import (
    PartitionFacts,
    SchedulerFacts,
    judge,
    parse_limit,
    parse_mpi,
    parse_partitions,
    parse_states,
)
from trainer.config import ClusterConfig
from trainer.config.schema import PartitionConfig, SiteConfig

SHOWN = (
    "PartitionName=gtest AllowGroups=ALL AllowAccounts=ALL Default=YES MaxNodes=UNLIMITED "
    "MaxTime=00:30:00 State=UP TotalCPUs=32 TotalNodes=4\n"
    "PartitionName=gp4d AllowAccounts=mst1,ent2 Default=NO MaxNodes=2 MaxTime=4-00:00:00 "
    "State=DRAIN TotalNodes=25\n"
    "PartitionName=open AllowAccounts=ALL MaxTime=UNLIMITED State=UP TotalNodes=1\n"
)
GTEST = PartitionFacts("gtest", "UP", True, 1800, None, 4, None)
FACTS = SchedulerFacts(
    version="slurm-wlm 22.05.8",
    partitions={"gtest": GTEST},
    usable_nodes=4,
    mpi=["pmix", "none"],
)
SITE = SiteConfig(name="site", scheduler="slurm")
JOB = ClusterConfig(nodes=2, site=SITE)


def test_partitions_are_read() -> None:
    found = parse_partitions(SHOWN)
    assert found["gtest"] == GTEST
    assert found["gp4d"] == PartitionFacts("gp4d", "DRAIN", False, 345600, 2, 25, ["mst1", "ent2"])
    assert found["open"].max_time_s is None


def test_small_answers_are_read() -> None:
    assert parse_limit("1-12:00:00") == 129600 and parse_limit("UNLIMITED") is None
    assert parse_states("3 idle\n1 down*\n2 mixed\n1 drained\n") == (5, {"down*": 1, "drained": 1})
    old = "srun: MPI types are...\nsrun: pmi2\nsrun: none\n"
    new = "MPI plugin types are...\n\tpmix\n\tnone\nspecific pmix plugin versions available: v4\n"
    assert parse_mpi(old) == ["pmi2", "none"] and parse_mpi(new) == ["pmix", "none"]


PAID = replace(SITE, account_required=True)
TIMED = replace(SITE, partitions={"gtest": PartitionConfig(max_hours=2)})


@pytest.mark.parametrize(
    ("facts", "cluster", "level", "words"),
    [
        (FACTS, JOB, "ok", ""),
        (SchedulerFacts(missing=["sbatch"]), JOB, "error", "not installed: sbatch"),
        (SchedulerFacts(missing=["sbatch"]), ClusterConfig(), "ok", "Slurm is absent"),
        (SchedulerFacts(problem="Unable to contact"), JOB, "error", "Unable to contact"),
        (FACTS, replace(JOB, partition="gtset"), "error", "did you mean gtest"),
        (replace(FACTS, partitions={"x": replace(GTEST, is_default=False)}), JOB, "error", "x"),
        (replace(FACTS, partitions={"gtest": replace(GTEST, state="DOWN")}), JOB, "error", "DOWN"),
        (FACTS, replace(JOB, time="01:00:00"), "error", "cluster.time=0-00:30:00"),
        (FACTS, replace(JOB, site=TIMED, partition="gtest"), "error", "0-02:00:00"),
        (FACTS, replace(JOB, site=TIMED), "warning", "out of date"),  # Slurm's own default
        (
            replace(FACTS, partitions={"gtest": replace(GTEST, max_time_s=9000)}),
            replace(JOB, site=TIMED),
            "warning",
            "out of date",
        ),
        (
            replace(FACTS, partitions={"gtest": replace(GTEST, accounts=["mst1"])}),
            replace(JOB, account="ent2"),
            "error",
            "closed to you",
        ),
        (FACTS, replace(JOB, nodes=5), "error", "gives a job 4"),
        (replace(FACTS, usable_nodes=1, unusable={"down*": 3}), JOB, "warning", "3 down*"),
        (FACTS, replace(JOB, site=PAID), "error", "cluster.account=null"),
        (
            replace(FACTS, accounts=["mst1"]),
            replace(JOB, account="mst2"),
            "error",
            "cluster.account=mst1",
        ),
        (FACTS, replace(JOB, site=replace(SITE, mpi="pmi2")), "error", "srun --mpi=pmi2"),
    ],
)
def test_judge(facts: SchedulerFacts, cluster: ClusterConfig, level: str, words: str) -> None:
    found = judge(facts, cluster)
    bad = [f for f in found if f.level != "ok"]
    assert [f.level for f in bad] == ([] if level == "ok" else [level]), bad
    text = " ".join(f"{f.what} {f.why} {f.remedy}" for f in bad or found)
    assert words in text
