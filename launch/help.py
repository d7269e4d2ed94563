"""``kuroshio VERB --help`` of the verbs that take a config, read from the files in conf/."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from launch import ROOT

CONF = ROOT / "conf"
FLAGS = {
    "run": """usage: kuroshio run [GROUP=OPTION | KEY=VALUE]... [--dry-run]
       kuroshio run --config FILE [--dry-run]
       kuroshio run pipeline=NAME [dir=FOLDER] [KEY=VALUE | STEP.KEY=VALUE]... [--dry-run]
       kuroshio run --multirun [KEY=A,B | KEY=VALUE]...

  --dry-run      compose, check and print the plan; loads no model, writes nothing
  --config FILE  a whole configuration instead of overrides, such as RUN/config.yaml
  --multirun     one run for every combination of the values of KEY=A,B
""",
    "prepare": """usage: kuroshio prepare [GROUP=OPTION | KEY=VALUE]... [--check]

Takes the overrides of the run that will read the data; under mpiexec, all ranks share the work.

  --check  only look: how files are read, lengths, what is left out and why; exit code 65 when
           more rows are bad than data.max_bad_row_share allows
""",
    "chat": """usage: kuroshio chat MODEL [KEY=VALUE]...

MODEL is a model folder, a run folder or a peft adapter folder. Piped lines are questions too.
""",
    "generate": """usage: kuroshio generate MODEL INPUT OUTPUT [KEY=VALUE]...

Answers the prompts in INPUT (any format that training reads, or a .txt with one a line) and writes
OUTPUT, JSON lines in the order of INPUT. Started again after a stop, it goes on.
""",
    "serve": """usage: kuroshio serve MODEL [KEY=VALUE]...

Serves /v1/chat/completions and /v1/completions; clients send the token as their API key.
""",
}
_KEY = re.compile(r"^(?P<indent> *)(?P<key>\w+):(?P<value> [^#]*?)? *(#(?P<comment>.*))?$")
_PACKAGE = re.compile(r"# @package (?P<name>\S+)")
KEY_WIDTH, VALUE_WIDTH = 42, 14


def verb_help(verb: str, arguments: Sequence[str] = (), conf: Path = CONF) -> str:
    """Return usage, groups with their options, and keys with values and comments.

    Args:
        verb: ``run`` or ``prepare``; others have keys only.
        arguments: words beside ``--help``; a ``GROUP=OPTION`` among them is taken as chosen, so
            that ``kuroshio run stage=vocab --help`` lists that stage's keys.
        conf: folder of the config groups.
    """
    if (conf / f"{verb}.yaml").is_file() and verb != "run":
        return "\n".join([FLAGS[verb], "keys (KEY=VALUE)", *_verb_lines(verb, conf)]) + "\n"
    defaults = default_options(conf)
    chosen = {**defaults, **_choices(arguments, conf)}
    lines = [FLAGS[verb], "groups (GROUP=OPTION; * = chosen)"]
    for group, option in chosen.items():
        lines += ["", f"  {group}", *_option_lines(conf, group, option)]
    lines += ["", "keys (KEY=VALUE) of what is chosen"]
    for prefix, path in _key_files(conf, chosen, defaults):
        lines += ["", *_key_lines(path, prefix)]
    return "\n".join(lines) + "\n"


def cluster_help(arguments: Sequence[str] = (), conf: Path = CONF) -> str:
    """Return the options and keys of the group ``cluster``, for verbs about a run's machines."""
    option = _choices(arguments, conf).get("cluster", "local")
    lines = ["", "  cluster", *_option_lines(conf, "cluster", option), ""]
    lines += _key_lines(conf / "cluster" / "local.yaml", "cluster.")
    if option != "local":
        lines += ["", *_key_lines(conf / "cluster" / f"{option}.yaml", "cluster.")]
    return "\n".join([*lines, "", "all other groups and keys: kuroshio run --help"]) + "\n"


def verb_files(verb: str, conf: Path = CONF) -> list[Path]:
    """Return the files that hold the keys of a verb without groups, its own first."""
    own = conf / f"{verb}.yaml"
    names = yaml.safe_load(own.read_text(encoding="utf-8"))["defaults"]
    return [own, *(conf / f"{name}.yaml" for name in reversed(names) if name != "_self_")]


def read_keys(path: Path) -> list[str]:
    """Return the dotted keys of a YAML file that have a value or a comment."""
    return [line.split()[0] for line in _key_lines(path, "")]


def _verb_lines(verb: str, conf: Path) -> list[str]:
    own, *others = verb_files(verb, conf)
    replaced = yaml.safe_load(own.read_text(encoding="utf-8"))
    lines = ["", *_key_lines(own, "")]
    for path in others:
        shown = [line for line in _key_lines(path, "") if line.split()[0] not in replaced]
        lines += ["", *shown]
    return lines


def default_options(conf: Path = CONF) -> dict[str, str | None]:
    """Return every group of run.yaml's defaults list with the option it names."""
    entries = yaml.safe_load((conf / "run.yaml").read_text(encoding="utf-8"))["defaults"]
    return {group: option for e in entries if isinstance(e, dict) for group, option in e.items()}


def describe(path: Path) -> str:
    """Return the first comment of an option's file, which says what it is."""
    comments = (line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return next((c for c in comments if c and not c.startswith("@package")), "")


def _choices(arguments: Sequence[str], conf: Path) -> dict[str, str]:
    pairs = (word.partition("=")[::2] for word in arguments)
    return {group: option for group, option in pairs if (conf / group / f"{option}.yaml").is_file()}


def _option_lines(conf: Path, group: str, default: str | None) -> list[str]:
    return [
        f"    {'*' if path.stem == default else ' '} {path.stem:<16} {describe(path)}"
        for path in sorted((conf / group).glob("*.yaml"))
    ]


def _key_files(
    conf: Path, chosen: Mapping[str, str | None], defaults: Mapping[str, str | None]
) -> list[tuple[str, Path]]:
    """Return the files whose keys are listed, each with the section they stand in.

    A group's default option explains all of the group's keys; another one lists only what it sets.
    """
    files = [("", conf / "run.yaml")]
    for group, option in chosen.items():
        for name in dict.fromkeys((option if group == "stage" else defaults[group], option)):
            path = conf / group / f"{name}.yaml"
            if path.is_file():
                package = _PACKAGE.match(path.read_text(encoding="utf-8"))
                section = f"{package['name'] if package else group}."
                files.append((section.removeprefix("_global_."), path))
    return files


def _key_lines(path: Path, prefix: str) -> list[str]:
    """Return one line for each key of a YAML file that has a value or a comment."""
    lines: list[str] = []
    parents: list[tuple[int, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        match = _KEY.match(line)
        if match is None or match["key"] == "defaults":
            continue
        indent, value = len(match["indent"]), (match["value"] or "").strip()
        parents = [parent for parent in parents if parent[0] < indent]
        key = prefix + ".".join([*(name for _, name in parents), match["key"]])
        parents.append((indent, match["key"]))
        comment = (match["comment"] or "").strip()
        if value or comment:
            lines.append(f"  {key:<{KEY_WIDTH}} {value:<{VALUE_WIDTH}} {comment}".rstrip())
    return lines
