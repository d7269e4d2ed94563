"""A Slurm job as data, and its script as text: nothing here talks to Slurm.

No value reaches the text unchecked: each has a pattern of characters that neither Slurm nor a shell
reads as anything but themselves, and is quoted all the same. Two templates would drift apart, so
``slurm/train.sbatch``, for people who submit by hand, comes from the same one.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template

from trainer.config import ClusterConfig
from trainer.config.cluster import format_time, partition_name, time_limit_s
from trainer.errors import ConfigError

TEMPLATE = Path(__file__).with_name("job.sbatch.j2")
MIB = 2**20
SHORT_SIGNAL_S = 120  # where the limit is not known: a limit below the signal would end every life
# What a job takes over from the shell that submits it, if it is set there; no other secrets.
EXPORTED = (
    "HOME,USER,LOGNAME,SHELL,PATH,LANG,LC_ALL,SLURM_CONF,HF_HOME,HF_TOKEN,"
    "WANDB_API_KEY,WANDB_ENTITY,WANDB_BASE_URL"
)
_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]*"
_PATH = r"/[A-Za-z0-9_.:,=+@/-]*"
_RANGES = r"[0-9]+(-[0-9]+)?"
PATTERNS: dict[str, str] = {  # field of SlurmJob -> what its whole text must match
    "name": _WORD,
    "folder": _PATH,
    "code": _PATH,
    "python": rf"{_PATH}|python3?(\.[0-9]+)?",
    "environment": r"[a-z0-9_]+",
    "image": _PATH,
    "partition": _WORD,
    "account": _WORD,
    "time": r"([0-9]{1,3}-)?[0-9]{1,3}:[0-9]{2}:[0-9]{2}",
    "gres": r"[A-Za-z0-9_.:,=-]+",
    "exclude": r"[A-Za-z0-9][A-Za-z0-9_.,\[\]-]*",
    "mpi": r"[a-z0-9_]+",
    "scratch": _PATH,
    "output": r"/[A-Za-z0-9_.:,=+@/%-]*",
    "array": rf"{_RANGES}(,{_RANGES})*(%[0-9]+)?",
    "list_file": _PATH,
}
KEYS = {  # field -> what the user sets
    "folder": "run_dir",
    "name": "name",
    "environment": "cluster.site.name",
    "partition": "cluster.partition",
    "account": "cluster.account",
    "time": "cluster.time",
    "exclude": "cluster.exclude",
    "image": "cluster.image",
    "gres": "cluster.site.gres",
    "mpi": "cluster.site.mpi",
    "scratch": "cluster.site.local_scratch",
}
_JOB_ID = r"[0-9]+"


@dataclass(frozen=True)
class SlurmJob:
    """What one ``sbatch`` is told.

    Attributes:
        name: of the job.
        folder: the run's folder, or of a command what it is about; holds ``logs/``.
        code: folder with the snapshot of the code that runs.
        environment: ``slurm/env/NAME.sh`` in that snapshot.
        nodes, tasks_per_node: one task for each GPU.
        cpus_per_task: cores; None leaves it to Slurm.
        memory_mib: host memory of a node; None leaves it to Slurm.
        gres: of a node, such as ``gpu:8``; empty asks for none.
        partition, account, time, exclude: None leaves them out.
        signal_s: seconds before the time limit at which the ranks are told to save.
        python: what runs the ranks.
        image: container image, empty for none.
        mpi: of ``srun --mpi``.
        scratch: node-local folder; None takes the job's or the node's temporary one.
        offline: tell libraries to stay off the network.
        parents: jobs that must have ended well before.
        array: task numbers of an array and its limit, such as ``0-3%2``.
        list_file: of an array, the run folder of each task, one a line.
        prepares: fill the token store before the ranks start.
        command: instead of a run's ranks, words for ``kuroshio`` on the first node; ``-m MODULE``
            runs a module of the snapshot.
        each_node: the command is one of ``kuroshio doctor``: it runs in one step for each node,
            with ``FOLDER/plan.json`` as input, and a node that fails does not end the others.
        requeue: start again when a node is lost, or as ``launch.job_end`` decides.
        output: of the job's script; None is ``FOLDER/logs/job-%j.out``.
        shared: the Unix group may read what the job writes.
        max_lives, max_idle_lives: see ``launch.job_end``.
    """

    name: str
    folder: str
    code: str
    environment: str
    nodes: int = 1
    tasks_per_node: int = 1
    cpus_per_task: int | None = None
    memory_mib: int | None = None
    gres: str = ""
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    exclude: str | None = None
    signal_s: int = 300
    python: str = "python"
    image: str = ""
    mpi: str = "none"
    scratch: str | None = None
    offline: bool = True
    parents: tuple[str, ...] = ()
    array: str | None = None
    list_file: str | None = None
    prepares: bool = True
    command: tuple[str, ...] = ()
    each_node: bool = False
    requeue: bool = True
    output: str | None = None
    shared: bool = False
    max_lives: int = 20
    max_idle_lives: int = 3

    def __post_init__(self) -> None:
        """Raise ConfigError with every value that has no place in a job script."""
        if problems := list(self.problems()):
            raise ConfigError("\n".join(problems))

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with each value."""
        for field, pattern in PATTERNS.items():
            value = getattr(self, field)
            if value not in (None, "") and not re.fullmatch(pattern, value, re.ASCII):
                key = KEYS.get(field, field)
                yield (
                    f"{key}={value!r} has characters that do not belong in a job script; "
                    f"expected {pattern}"
                )
        for job in self.parents:
            if not re.fullmatch(_JOB_ID, job, re.ASCII):
                yield f"{job!r} is no job number; give the digits that sbatch printed"
        for word in self.command:
            if re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029]", word):  # and other ends of lines
                yield f"{word!r} has control characters, which a job script cannot hold"


def job_of(cluster: ClusterConfig, name: str, folder: str, code: str) -> SlurmJob:
    """Return the job of a run with one task for each GPU, as the site's profile wants it.

    Args:
        cluster: what is asked for, and the facts of its site.
        name: of the job.
        folder: the run's, absolute.
        code: of the snapshot, absolute.

    Raises:
        ConfigError: with every value that has no place in a job script.
    """
    site, ranks = cluster.site, cluster.gpus_per_node
    limit = time_limit_s(cluster)
    return SlurmJob(
        name=name,
        folder=folder,
        code=code,
        environment=site.name,
        nodes=cluster.nodes,
        tasks_per_node=ranks,
        cpus_per_task=cpus_per_task(cluster),
        memory_mib=memory_mib(cluster),
        gres=site.gres.replace("{n}", str(ranks)),
        partition=partition_name(cluster),
        account=cluster.account,
        time=cluster.time or (format_time(limit) if limit else None),
        exclude=cluster.exclude,
        python="python" if cluster.image else sys.executable,
        image=cluster.image or "",
        mpi=site.mpi or "none",
        scratch=site.local_scratch,
        offline=site.internet is not True,
        shared=cluster.share_with_group,
        max_lives=cluster.max_lives,
        max_idle_lives=cluster.max_lives_without_progress,
    )


def cpus_per_task(cluster: ClusterConfig) -> int | None:
    """Return the cores of a rank: its GPU's share, on CPU nodes its share of the node's."""
    site = cluster.site
    if site.gpus_per_node == 0 and site.cpus_per_node:
        return max(1, site.cpus_per_node // cluster.gpus_per_node)
    return site.cpus_per_gpu


def memory_mib(cluster: ClusterConfig) -> int | None:
    """Return the host memory of a node that comes with its GPUs; Slurm counts in MiB."""
    share = cluster.site.memory_gb_per_gpu
    return None if share is None else int(share * 1e9 * cluster.gpus_per_node) // MIB


def one_task(job: SlurmJob, command: tuple[str, ...], cluster: ClusterConfig) -> SlurmJob:
    """Return ``job`` as one task on one node, with one GPU where the site's jobs have GPUs."""
    single = replace(cluster, nodes=1, gpus_per_node=1)
    return replace(
        job,
        nodes=1,
        tasks_per_node=1,
        cpus_per_task=cpus_per_task(single),
        memory_mib=memory_mib(single),
        gres=cluster.site.gres.replace("{n}", "1"),
        command=command,
    )


def render(job: SlurmJob, by_hand: bool = False) -> str:
    """Return the job's script.

    Args:
        job: all of its values are checked.
        by_hand: take the words of ``kuroshio run`` from the command line instead of a run folder.
    """
    scratch = shlex.quote(job.scratch) if job.scratch else "${SLURM_TMPDIR:-${TMPDIR:-/tmp}}"
    return _template().render(
        directives=list(_directives(job, by_hand)),
        by_hand=by_hand,
        gpus=bool(job.gres),
        **{**vars(job), "scratch": scratch},
    )


@cache
def _template() -> Template:
    environment = Environment(  # a shell script, not a web page
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["sh"] = shlex.quote
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def by_hand(cluster: ClusterConfig) -> str:
    """Return the text of ``slurm/train.sbatch``, with the directives of one node of a site."""
    job = job_of(cluster, "kuroshio", "/run", "/code")
    job = replace(job, python="python", partition=None, time=None, signal_s=SHORT_SIGNAL_S)
    return render(job, by_hand=True)


def _directives(job: SlurmJob, by_hand: bool) -> Iterator[tuple[str, str]]:
    """Yield the flags of ``sbatch`` and their values, which are never quoted: see PATTERNS."""
    yield "job-name", job.name
    optional = {"account": job.account, "partition": job.partition, "time": job.time}
    yield from ((flag, value) for flag, value in optional.items() if value)
    yield "nodes", str(job.nodes)
    yield "ntasks-per-node", str(job.tasks_per_node)
    if job.cpus_per_task:
        yield "cpus-per-task", str(job.cpus_per_task)
    if job.memory_mib:
        yield "mem", f"{job.memory_mib}M"
    if job.gres:
        yield "gres", job.gres
    if job.exclude:
        yield "exclude", job.exclude
    if job.array:
        yield "array", job.array
    if job.parents:
        yield "dependency", "afterok:" + ":".join(job.parents)
        yield "kill-on-invalid-dep", "no"  # a child of a failed parent waits to be looked at
    number = "%A_%a" if job.array else "%j"
    folder = "" if by_hand else f"{job.folder}/logs/"
    yield "output", job.output or f"{folder}{'kuroshio' if by_hand else 'job'}-{number}.out"
    yield "open-mode", "append"
    yield ("requeue" if job.requeue else "no-requeue"), ""
    if job.each_node:
        yield "no-kill", ""  # go on without a node that is lost
    if not job.command:
        yield "signal", f"USR1@{job.signal_s}"  # to the ranks, not to the script
    yield "export", EXPORTED
