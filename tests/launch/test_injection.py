"""Whatever a user gives ends as one word in a job script, or is refused: fuzzed over every value.

``python tests/launch/test_injection.py 20000`` draws that many values and prints what became of
them; docs/reliability.md has the figures.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch import sbatch, slurm_queue
from launch.compose import compose_values
from launch.graph.definition import read_pipeline
from launch.slurm import SlurmJob, job_of, render
from launch.sweep import task_name
from trainer.config import load_config
from trainer.config.cluster import check_submission
from trainer.errors import ConfigError

BREAKING = [
    "\n", "\r", "\r\n", "\0", "\x0b", "\x0c", "\x1b[2J", "\x85", "\u2028", "\u2029", "\ufeff", "'",
    '"', "`id`", "$(id)", "${HOME}", "$HOME", ";", "&", "&&", "|", "<", ">", "(", ")", "{", "}",
    "*", "?", "[", "]", "!", "#", "~", "\\", " ", "\t", "\u00a0", "\u3000", "%j", "%A_%a", "%",
    "--", "-", "-x", "--wrap=id", "=", ",", ":", "/", "..", "\n#SBATCH --wrap=id", "EOF", "٣",
]  # fmt: skip
TEXT = st.one_of(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=30),
    st.lists(
        st.one_of(st.sampled_from(BREAKING), st.text("aZ09_.", max_size=4)), min_size=1, max_size=6
    )
    .map("".join)
    .filter(bool),
    st.tuples(st.sampled_from(["/work/", "a", "n1", "1:00:00"]), st.sampled_from(BREAKING)).map(
        "".join
    ),
)
CLUSTER = load_config(compose_values(["cluster=taiwania2", "cluster.account=MST109001"])).cluster
GENERIC = load_config(compose_values(["cluster=generic_slurm"])).cluster
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f\x85\u2028\u2029]")
SAFE = re.compile(r"[A-Za-z0-9_.:,=+@%/\[\]-]+", re.ASCII)


def by_name(value: str) -> SlurmJob:
    return job_of(CLUSTER, value, "/work/run", "/work/run/code")


def by_folder(value: str) -> SlurmJob:
    return job_of(CLUSTER, "name", value, f"{value}/code")


def by_cluster(**values: Any) -> SlurmJob:
    """Return the job of a cluster's own values: what `submit` checks first, then the job."""
    cluster = replace(GENERIC, **values)
    if problems := check_submission(cluster):
        raise ConfigError("\n".join(problems))
    return job_of(cluster, "name", "/work/run", "/work/run/code")


def by_site(**values: Any) -> SlurmJob:
    site = replace(GENERIC.site, **values)
    return by_cluster(site=site)


def by_swept_value(value: str) -> SlurmJob:
    name = task_name({"loop.seed": value, "optim.lr": "1"})
    return job_of(CLUSTER, f"run+{name}", f"/work/{name}", "/work/code")


def by_swept_key(value: str) -> SlurmJob:
    name = task_name({value: "1"})
    return job_of(CLUSTER, f"run+{name}", f"/work/{name}", "/work/code")


WAYS: dict[str, Callable[[str], SlurmJob]] = {
    "name": by_name,
    "run_dir": by_folder,
    "a sweep's value": by_swept_value,
    "a sweep's key": by_swept_key,
    "--after": lambda value: replace(by_name("a"), parents=("12", value)),
    "a command's word": lambda value: replace(by_name("a"), command=("run", "--step", value)),
    **{
        f"cluster.{key}": lambda value, key=key: by_cluster(**{key: value})  # type: ignore[misc]
        for key in ("partition", "account", "time", "exclude", "image")
    },
    **{
        f"cluster.site.{key}": lambda value, key=key: by_site(**{key: value})  # type: ignore[misc]
        for key in ("name", "gres", "mpi", "local_scratch")
    },
}
# What the script says where, for values that take the same place.
BASE = {way: make("/work/a" if way in ("run_dir", "cluster.image", "cluster.site.local_scratch")
                  else "1:00:00" if way == "cluster.time" else "12" if way == "--after" else "a1")
        for way, make in WAYS.items()}  # fmt: skip


def shape(text: str) -> list[str]:
    """Return what every line is, without the values: a flag's name, or its words' number."""
    found = []
    for line in text.split("\n"):
        flag = re.match(r"#SBATCH --([a-z-]+)(=|$)", line)
        found.append(flag[1] if flag else re.split(r"=| run --step ", line)[0])
    return found


def read_words(line: str) -> list[str]:
    """Return the words that a POSIX shell reads in a line, quotes removed."""
    return shlex.split(line, comments=True, posix=True)


def refuse_script(job: SlurmJob, base: SlurmJob) -> None:
    """Assert that a script has the same lines as its base, and each value as one word."""
    text, expected = render(job), render(base)
    # str.splitlines also breaks at characters that other programs may take for a line's end.
    assert text.splitlines() == text.split("\n")[:-1]
    assert shape(text) == shape(expected)
    for line in text.splitlines():
        if line.startswith("#SBATCH "):
            assert SAFE.fullmatch(line.removeprefix("#SBATCH ")), line
    own = {"RUN": job.folder, "CODE": job.code, "ENVIRONMENT": job.environment,
           "IMAGE": job.image, "PYTHON": job.python}  # fmt: skip
    for name, value in own.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name}=")]
        assert read_words(line) == [f"{name}={value}"], line
    if job.command:
        (line,) = [line for line in text.splitlines() if '"$CODE" run --step' in line]
        words = read_words(line.removesuffix(" || RC=$?"))
        assert words[-len(job.command) :] == list(job.command), line
    assert not re.search(r"%[^j]", job.output or ""), job.output


def attempt(way: str, value: str) -> SlurmJob | None:
    """Return the job that a value makes, None when it is refused in words."""
    try:
        job = WAYS[way](value)
    except ConfigError as error:
        assert not RAW.search(str(error)), "a refusal writes control characters to a terminal"
        return None
    refuse_script(job, BASE[way])
    return job


@pytest.mark.parametrize("way", WAYS)
def test_breaking_characters_never_reach_a_script(way: str) -> None:
    """Alone, in front, behind and in the middle of a good value."""
    good = "/work/a" if way in ("run_dir", "cluster.image", "cluster.site.local_scratch") else "a1"
    for piece in BREAKING:
        for value in (piece, piece + good, good + piece, f"{good}{piece}b"):
            attempt(way, value)


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(WAYS)), TEXT)
def test_no_value_is_more_than_one_word(way: str, value: str) -> None:
    attempt(way, value)


def test_the_check_would_notice_a_value_that_breaks_out() -> None:
    """The fuzz is worth as much as what it takes for a break."""
    loose = by_name("a")
    for field, value in (
        ("name", "a\n#SBATCH --wrap=id"), ("name", "a b"), ("folder", "/a\u2028b"),
        ("account", "x --wrap=id"), ("name", "a;id"), ("partition", "$(id)"),
    ):  # fmt: skip
        broken = replace(loose)
        object.__setattr__(broken, field, value)  # past its checks
        with pytest.raises((AssertionError, ValueError)):
            refuse_script(broken, loose)


def bash_reads(jobs: list[SlurmJob], folder: Path) -> list[list[str]]:
    """Return what bash itself takes the values of scripts for, each after ``bash -n``."""
    names = ("RUN", "CODE", "ENVIRONMENT", "IMAGE", "PYTHON")
    paths = []
    for number, job in enumerate(jobs):
        path = folder / f"{number}.sh"
        path.write_text(render(job), encoding="utf-8")
        paths.append(path)
    program = (
        'for file; do bash -n "$file" || exit 9; '
        'eval "$(grep -E "^(RUN|CODE|ENVIRONMENT|IMAGE|PYTHON)=" "$file")"; '
        + "printf '%s\\0' "
        + " ".join(f'"${name}"' for name in names)
        + "; done"
    )
    done = subprocess.run(["bash", "-c", program, "x", *map(str, paths)], capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    read = done.stdout.decode().split("\0")[:-1]
    return [read[i : i + len(names)] for i in range(0, len(read), len(names))]


def test_bash_reads_every_value_as_it_is(tmp_path: Path) -> None:
    pieces = [".", ",", ":", "=", "+", "@", "-", "--x", "_", "a.b"]
    jobs = [by_folder(f"/work/{piece}/r{piece}") for piece in pieces]
    jobs += [by_cluster(image=f"/images/i{piece}.sif") for piece in pieces]
    expected = [[j.folder, j.code, j.environment, j.image, j.python] for j in jobs]
    assert bash_reads(jobs, tmp_path) == expected


@settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
@given(name=TEXT, folder=TEXT)
def test_steps_and_folders_of_pipelines(tmp_path_factory: Any, name: str, folder: str) -> None:
    """Names of steps become folders and names of jobs."""
    file = tmp_path_factory.getbasetemp() / "pipeline.yaml"
    steps = {"a": {"run": ["name=x"]}, name: {"tokenizer": {"paths": ["a"], "vocab_size": 9}}}
    file.write_text(json.dumps({"dir": folder, "steps": steps}), encoding="utf-8")
    try:
        pipeline = read_pipeline([f"pipeline={file}"], absolute=True)
    except ConfigError:
        return
    for step in pipeline.steps.values():
        job = job_of(CLUSTER, f"{pipeline.name}-{step.name}", str(step.folder), "/work/code")
        words = ("run", "--step", str(pipeline.folder), step.name)
        refuse_script(replace(job, command=words), replace(by_name("a"), command=words))


@pytest.mark.parametrize("value", ["1;id", "-u me", "--user=me", "1,2", "$(id)", "1\n2", "", "٣"])
def test_numbers_of_jobs_that_are_none_reach_no_program(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come from files in run folders, which may be another user's."""

    def call(*words: Any, **others: Any) -> Any:
        raise AssertionError(f"{words} was called")

    monkeypatch.setattr(subprocess, "run", call)
    assert slurm_queue.job_state(value) is None
    assert "scancel was not called" in sbatch.cancel(["12", value])


def draw(num_values: int) -> Iterator[tuple[str, str]]:
    """Yield ways and values as the tests draw them."""
    found: list[tuple[str, str]] = []

    @settings(
        max_examples=num_values, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.sampled_from(sorted(WAYS)), TEXT)
    def collect(way: str, value: str) -> None:
        found.append((way, value))

    collect()
    yield from found


if __name__ == "__main__":
    counts: Counter[str] = Counter()
    accepted: list[SlurmJob] = []
    for drawn_way, drawn in draw(int(sys.argv[1])):
        made = attempt(drawn_way, drawn)
        counts["refused" if made is None else "accepted"] += 1
        accepted += [made] if made else []
    different = list({render(job): job for job in accepted}.values())
    with tempfile.TemporaryDirectory() as scripts:
        for begin in range(0, len(different), 200):
            some = different[begin : begin + 200]
            read = bash_reads(some, Path(scripts))
            assert read == [[j.folder, j.code, j.environment, j.image, j.python] for j in some]
    print(json.dumps({"values": counts.total(), **counts, "scripts read by bash": len(different)}))
