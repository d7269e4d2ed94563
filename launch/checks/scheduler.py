"""Slurm: commands, partition, account, limits against the profile, MPI plugins."""

from __future__ import annotations

import getpass
import re
import shutil
from dataclasses import dataclass, field

from launch.checks.command import ask
from launch.checks.finding import Finding, error, ok, warning
from trainer.config import ClusterConfig, nearest
from trainer.config.cluster import (
    check_submission,
    format_time,
    partition_name,
    time_limit_s,
)

TOPIC = "slurm"
COMMANDS = ("sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
UNLIMITED = ("UNLIMITED", "INFINITE", "NONE", "")
USABLE = ("idle", "mixed", "allocated", "completing")  # node states, less their flags


@dataclass(frozen=True)
class PartitionFacts:
    """One partition as Slurm describes it; None is no limit."""

    name: str
    state: str
    is_default: bool
    max_time_s: int | None
    max_nodes: int | None
    num_nodes: int
    accounts: list[str] | None  # those that may use it; None: all


@dataclass(frozen=True)
class SchedulerFacts:
    """What Slurm says.

    Attributes:
        missing: commands that are not installed.
        version: of Slurm.
        problem: why the controller does not answer.
        partitions: by name.
        usable_nodes: of the job's partition: nodes that are up, busy or not; None if unknown.
        unusable: of the same: states of the others.
        mpi: plugins of ``srun --mpi=list``.
        accounts: this user's, where accounting tells; None where nothing does.
    """

    missing: list[str] = field(default_factory=list)
    version: str = ""
    problem: str = ""
    partitions: dict[str, PartitionFacts] = field(default_factory=dict)
    usable_nodes: int | None = None
    unusable: dict[str, int] = field(default_factory=dict)
    mpi: list[str] = field(default_factory=list)
    accounts: list[str] | None = None


def gather(cluster: ClusterConfig) -> SchedulerFacts:
    """Ask Slurm's commands; each answer is one request to the controller."""
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing or cluster.site.scheduler != "slurm":
        return SchedulerFacts(missing=missing)
    shown = ask(["scontrol", "--oneliner", "show", "partition"])
    if not shown.is_good:
        return SchedulerFacts(problem=shown.complaint or shown.text.strip())
    partitions = parse_partitions(shown.text)
    chosen = partition_name(cluster) or next(
        (p.name for p in partitions.values() if p.is_default), None
    )
    listed = ask(["sinfo", "-h", "-o", "%D %T", *(["-p", chosen] if chosen else [])])
    usable, unusable = parse_states(listed.text)
    mpi = ask(["srun", "--mpi=list"])
    return SchedulerFacts(
        version=ask(["sbatch", "--version"]).text.strip(),
        partitions=partitions,
        usable_nodes=usable if listed.is_good else None,
        unusable=unusable,
        mpi=parse_mpi(mpi.text + mpi.complaint),
        accounts=_ask_accounts(),
    )


def parse_partitions(text: str) -> dict[str, PartitionFacts]:
    """Read ``scontrol --oneliner show partition``."""
    partitions = {}
    for line in text.splitlines():
        values = dict(word.partition("=")[::2] for word in line.split() if "=" in word)
        if "PartitionName" not in values:
            continue
        allowed = values.get("AllowAccounts", "ALL")
        max_nodes = values.get("MaxNodes", "")
        partitions[values["PartitionName"]] = PartitionFacts(
            name=values["PartitionName"],
            state=values.get("State", "UP"),
            is_default=values.get("Default") == "YES",
            max_time_s=parse_limit(values.get("MaxTime", "")),
            max_nodes=int(max_nodes) if max_nodes.isdigit() else None,
            num_nodes=int(values.get("TotalNodes", "0")),
            accounts=None if allowed == "ALL" else allowed.split(","),
        )
    return partitions


def parse_limit(text: str) -> int | None:
    """Return the seconds of ``[D-]HH:MM:SS``, None for no limit."""
    if text.upper() in UNLIMITED:
        return None
    days, _, clock = text.rpartition("-")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def parse_states(text: str) -> tuple[int, dict[str, int]]:
    """Return the usable nodes, and the number of others by state, of ``sinfo -o '%D %T'``."""
    usable = 0
    unusable: dict[str, int] = {}
    for line in text.splitlines():
        number, state = line.split()
        if state in USABLE:  # a flag behind it, such as * for a silent node, makes it another word
            usable += int(number)
        else:
            unusable[state] = unusable.get(state, 0) + int(number)
    return usable, unusable


def parse_mpi(text: str) -> list[str]:
    """Read ``srun --mpi=list``: a headline, then a plugin a line; versions follow in brackets."""
    words = [re.sub(r"^srun:\s*", "", line).strip() for line in text.splitlines()]
    return [word for word in words if word and " " not in word]


def _ask_accounts() -> list[str] | None:
    user = getpass.getuser()
    answer = ask(["sacctmgr", "-nP", "show", "associations", f"user={user}", "format=account"])
    names = sorted(set(answer.text.split()))
    return names if answer.is_good and names else None


def judge(facts: SchedulerFacts, cluster: ClusterConfig) -> list[Finding]:
    """Judge Slurm for the job that ``cluster`` describes."""
    if cluster.site.scheduler != "slurm":
        there = "absent" if facts.missing else "present, and not used"
        return [ok(TOPIC, f"cluster={cluster.site.name} has no scheduler; Slurm is {there}")]
    if facts.missing:
        what = f"not installed: {', '.join(facts.missing)}"
        why = f"cluster={cluster.site.name} submits with them"
        remedy = "work on a login node of the cluster, or use `kuroshio run` on this machine"
        return [error(TOPIC, what, why, remedy)]
    if facts.problem:
        remedy = "look at `scontrol ping` and SLURM_CONF; ask the site when it stays away"
        return [error(TOPIC, "the controller does not answer", facts.problem, remedy)]
    return [
        ok(TOPIC, facts.version),
        *_judge_partition(facts, cluster),
        *_judge_account(facts, cluster),
        *_judge_mpi(facts, cluster.site.mpi),
    ]


def _judge_partition(facts: SchedulerFacts, cluster: ClusterConfig) -> list[Finding]:
    default = next((p.name for p in facts.partitions.values() if p.is_default), None)
    name = partition_name(cluster) or default
    names = ", ".join(facts.partitions)
    if name is None:
        remedy = f"give cluster.partition=NAME, one of {names}"
        return [error(TOPIC, "no partition", "Slurm has no default one", remedy)]
    found = facts.partitions.get(name)
    if found is None:
        why = f"Slurm has {names}{nearest(name, facts.partitions)}"
        return [error(TOPIC, f"there is no partition {name}", why, "give cluster.partition=NAME")]
    if found.state != "UP":
        remedy = f"choose another (cluster.partition=...): {names}"
        return [error(TOPIC, f"partition {name} is {found.state}", "its jobs wait", remedy)]
    return [*_judge_limits(found, cluster), *_judge_nodes(facts, found, cluster.nodes)]


def _judge_limits(found: PartitionFacts, cluster: ClusterConfig) -> list[Finding]:
    asked, limit = time_limit_s(cluster), found.max_time_s
    known = cluster.site.partitions.get(found.name)
    profile = known.max_hours if known else None
    shown = "no time limit" if limit is None else f"time limit {format_time(limit)}"
    what = f"partition {found.name}: {shown}, {found.num_nodes} nodes"
    findings = []
    if limit is not None and asked is not None and asked > limit:
        why = f"the job would ask for {format_time(asked)} and be refused"
        remedy = f"cluster.time={format_time(limit)}"
        findings.append(error(TOPIC, what, why, remedy))
    elif profile is not None and limit != round(profile * 3600):
        why = f"the profile says {profile:g} hours: it is out of date, and plans are wrong"
        remedy = f"mend max_hours of {found.name} in conf/cluster/{cluster.site.name}.yaml"
        findings.append(warning(TOPIC, what, why, remedy))
    if cluster.account and found.accounts is not None and cluster.account not in found.accounts:
        why = f"it is open to {', '.join(found.accounts)} only, not to {cluster.account}"
        remedy = "choose another partition or account"
        findings.append(error(TOPIC, f"partition {found.name} is closed to you", why, remedy))
    return findings or [ok(TOPIC, what)]


def _judge_nodes(facts: SchedulerFacts, found: PartitionFacts, nodes: int) -> list[Finding]:
    most = min(n for n in (found.max_nodes, found.num_nodes) if n is not None)
    if nodes > most:
        what = f"cluster.nodes={nodes}: partition {found.name} gives a job {most}"
        remedy = f"cluster.nodes={most}, or another partition"
        return [error(TOPIC, what, "such a job is refused, or waits for ever", remedy)]
    if facts.usable_nodes is None:
        return []
    away = ", ".join(f"{count} {state}" for state, count in facts.unusable.items())
    what = f"{facts.usable_nodes} nodes of {found.name} are up" + (f", {away}" if away else "")
    if nodes > facts.usable_nodes:
        why = f"a job of {nodes} nodes waits until some come back"
        return [warning(TOPIC, what, why, "ask for fewer nodes, or look at `sinfo -R`")]
    return [ok(TOPIC, what)]


def _judge_account(facts: SchedulerFacts, cluster: ClusterConfig) -> list[Finding]:
    problems = check_submission(cluster)
    if problems:
        remedy = "set cluster.account to your project; `sacctmgr show associations` may list it"
        return [error(TOPIC, p, "Slurm would refuse the job", remedy) for p in problems]
    name, known = cluster.account, facts.accounts
    if known is not None and name is not None and name not in known:
        why = f"Slurm knows you in {', '.join(known)}"
        return [error(TOPIC, f"account {name} is not yours", why, f"cluster.account={known[0]}")]
    if name is None:
        return [ok(TOPIC, "no account is asked for")]
    told = "one of yours" if known is not None else "not checked: no command here lists yours"
    return [ok(TOPIC, f"account {name}: {told}")]


def _judge_mpi(facts: SchedulerFacts, mpi: str | None) -> list[Finding]:
    plugins = ", ".join(facts.mpi) or "none"
    if mpi is None or mpi in facts.mpi:
        return [ok(TOPIC, f"srun --mpi has {plugins}; Kuroshio's own ranks need none")]
    why = "srun refuses a plugin that it does not have"
    remedy = "set cluster.site.mpi to one of them, or null"
    return [error(TOPIC, f"srun --mpi={mpi} is missing; there are {plugins}", why, remedy)]
