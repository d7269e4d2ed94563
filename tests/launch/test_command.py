"""The command line itself: help, unknown verbs, completion, errors without a traceback."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from launch.__main__ import ON_MACHINES, VERBS, WITH_KEYS, help_text
from launch.completion import find_flags

ROOT = Path(__file__).resolve().parents[2]
CLI = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")


def kuroshio(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", *words]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environ}
    )


def complete(line: str, shell: str = "bash") -> list[str]:
    done = kuroshio("-sc", f"query={shell}", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_help_names_every_verb_and_is_fast() -> None:
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = kuroshio("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        seconds.append(used)  # processor time: a busy machine does not count
    assert min(seconds) < 0.3
    assert done.returncode == 0
    assert all(f"  {verb} " in done.stdout for verb in VERBS)


@pytest.mark.parametrize("words", [["--help"], *([verb, "--help"] for verb in WITH_KEYS)])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\nsys.argv[1:] = " + repr(words) + "\nfrom launch.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'hydra', 'transformers', 'deepspeed', 'numpy', 'rich'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.endswith("HEAVY []\n"), done.stdout[-300:] + done.stderr


def test_verb_help_lists_groups_options_and_keys_from_conf() -> None:
    text = kuroshio("run", "--help").stdout
    assert "--dry-run" in text
    for group in ("model", "engine", "schedule", "peft", "log", "cluster", "stage", "debug"):
        assert f"\n  {group}\n" in text
    assert "* zero2 " in text and "  zero3_nvme " in text
    line = next(line for line in text.splitlines() if "loop.global_batch_tokens" in line)
    assert line.split()[1] == "8192" and "tokens of one optimizer step" in line


def test_verb_help_of_chat_lists_its_keys_with_values() -> None:
    lines = [line.split() for line in kuroshio("chat", "--help").stdout.splitlines()]
    assert ["top_p", "0.9"] in [line[:2] for line in lines]
    assert ["persona", "null"] in [line[:2] for line in lines]


def test_verb_help_follows_the_chosen_options() -> None:
    text = kuroshio("run", "engine=zero3_offload", "--help").stdout
    assert "* zero3_offload " in text and "* zero2 " not in text
    lines = [line.split()[:2] for line in text.splitlines() if "offload_params" in line]
    assert ["engine.offload_params", "cpu"] in lines


@pytest.mark.parametrize("verb", VERBS)
def test_help_and_documentation_of_a_verb(verb: str) -> None:
    text = help_text(verb)
    assert text.startswith(f"usage: kuroshio {verb} ")
    assert ("cluster.account" in text) == (verb in (*ON_MACHINES, "run", "prepare"))
    flags = set(find_flags(verb, help_text)) - {"--help"}
    section = re.search(rf"^### {verb}$(.*?)(?=^##)", CLI, re.MULTILINE | re.DOTALL)
    assert section, f"docs/cli.md has no section ### {verb}"
    documented = set(re.findall(r"^\| `(--[a-z][a-z-]*)", section[1], re.MULTILINE))
    assert documented == flags


def test_help_of_machines_follows_the_chosen_cluster() -> None:
    text = help_text("submit", ["cluster=taiwania2", "--help"])
    assert "* taiwania2 " in text and "* local " not in text and "V100-SXM2-32GB" in text


def test_unknown_verb_names_the_nearest() -> None:
    done = kuroshio("rnu")
    assert done.returncode == 78
    assert "'rnu' is no verb" in done.stderr and "did you mean run?" in done.stderr
    assert "Traceback" not in done.stderr


def test_config_error_is_a_message_with_its_exit_code() -> None:
    done = kuroshio("run", "loop.max_step=3")
    assert done.returncode == 78
    assert done.stderr.startswith("kuroshio: loop.max_step is not a known key")
    assert "Traceback" not in done.stderr


def test_unknown_flag_is_refused() -> None:
    done = kuroshio("run", "--dryrun")
    assert done.returncode == 78 and "--dryrun: no such flag" in done.stderr


def test_overrides_beside_a_whole_config_are_refused() -> None:
    done = kuroshio("run", "--config", "x.yaml", "loop.seed=1")
    assert done.returncode == 78 and "loop.seed=1" in done.stderr


def test_completion_of_verbs() -> None:
    assert complete("kuroshio ") == list(VERBS)
    assert complete("kuroshio re") == ["resume", "report"]


def test_completion_of_options_groups_and_keys() -> None:
    assert {"schedule=cosine", "schedule=wsd"} < set(complete("kuroshio run schedule="))
    assert complete("kuroshio run stage=pre") == ["stage=pretrain"]
    assert "engine=" in complete("kuroshio run eng")
    assert complete("kuroshio run engine=zero3 loop.max_") == ["loop.max_steps="]
    assert complete("kuroshio prepare data.max_l") == ["data.max_length="]
    assert complete("kuroshio chat FOLDER top") == ["top_k=", "top_p="]
    assert complete("kuroshio submit cluster=taiw") == ["cluster=taiwania2"]
    assert "pipeline=demo" in complete("kuroshio run pipeline=")


def test_completion_of_flags_and_of_folders() -> None:
    assert complete("kuroshio run --d") == ["--dry-run"]
    assert complete("kuroshio logs runs/x --") == ["--help", "--rank", "--lines", "--follow"]
    assert complete("kuroshio watch ru") == []  # the shell completes the folder


def test_completion_code_can_be_installed_in_bash() -> None:
    done = kuroshio("-sc", "install=bash")
    assert "-F hydra_bash_completion kuroshio" in done.stdout
    check = subprocess.run(["bash", "-n"], input=done.stdout, capture_output=True, text=True)
    assert (check.returncode, check.stderr) == (0, "")


def test_completion_in_a_real_bash(tmp_path: Path) -> None:
    command = tmp_path / "kuroshio"
    command.write_text(
        f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m launch "$@"\n', encoding="utf-8"
    )
    command.chmod(0o755)
    script = (
        'eval "$(kuroshio -sc install=bash)"\n'
        'COMP_LINE="kuroshio run schedule=co" COMP_POINT=25 COMP_CWORD=2\n'
        "hydra_bash_completion\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environ
    )
    assert done.stdout.split() == ["schedule=constant", "schedule=cosine"], done.stderr


@pytest.mark.parametrize("words", [[], ["install"], ["install=tcsh"], ["erase=bash"]])
def test_bad_completion_request_is_refused(words: list[str]) -> None:
    done = kuroshio("-sc", *words)
    assert done.returncode == 78 and "Traceback" not in done.stderr


def test_a_foreign_trainer_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").touch()
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", "import launch"], capture_output=True, text=True, env=environ,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert "package 'trainer' resolves to" in done.stderr and "PYTHONPATH=" in done.stderr


LEAVE = """
import atexit, os, sys
atexit.register(lambda: os._exit(134))  # stands for a teardown that aborts
if sys.argv[1] == "rank":
    import launch.agreement
from launch.__main__ import leave
print("the last line")
leave(7)
"""


def test_a_rank_s_exit_code_survives_the_teardown_of_its_libraries() -> None:
    command = [sys.executable, "-c", LEAVE]
    rank, alone = (
        subprocess.run([*command, kind], cwd=ROOT, capture_output=True, text=True)
        for kind in ("rank", "alone")
    )
    assert (rank.returncode, rank.stdout) == (7, "the last line\n")
    assert alone.returncode == 134  # the stand-in does abort where Python tears down
