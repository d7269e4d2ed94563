"""``kuroshio VERB --help`` of the verbs that take a config, read from the files in conf/."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from launch import ROOT

CONF = ROOT / "conf"
FLAGS = {
    "run": """usage: kuroshio run [GROUP=OPTION | KEY=VALUE]... [--dry-run]
       kuroshio run --config FILE [--dry-run]

  --dry-run      compose, check and print the plan; loads no model, writes nothing
  --config FILE  a whole configuration instead of overrides, such as RUN/config.yaml
""",
    "prepare": """usage: kuroshio prepare [GROUP=OPTION | KEY=VALUE]...

Takes the overrides of the run that will read the data; under mpiexec, all ranks share the work.
""",
}
_KEY = re.compile(r"^(?P<indent> *)(?P<key>\w+):(?P<value> [^#]*?)? *(#(?P<comment>.*))?$")
KEY_WIDTH, VALUE_WIDTH = 34, 16


def verb_help(verb: str, conf: Path = CONF) -> str:
    """Return usage, groups with their options, and keys with defaults and comments."""
    lines = [FLAGS[verb], "groups (GROUP=OPTION; * = default)"]
    for group, default in default_options(conf).items():
        lines += ["", f"  {group}"] + _option_lines(conf, group, default)
    lines += ["", "keys (KEY=VALUE) and their defaults"]
    for prefix, path in _key_files(conf):
        lines += ["", *_key_lines(path, prefix)]
    return "\n".join(lines) + "\n"


def default_options(conf: Path = CONF) -> dict[str, str | None]:
    """Return every group of run.yaml's defaults list with the option it names."""
    entries = yaml.safe_load((conf / "run.yaml").read_text(encoding="utf-8"))["defaults"]
    return {group: option for e in entries if isinstance(e, dict) for group, option in e.items()}


def describe(path: Path) -> str:
    """Return the first comment of an option's file, which says what it is."""
    comments = (line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return next((c for c in comments if c and not c.startswith("@package")), "")


def _option_lines(conf: Path, group: str, default: str | None) -> list[str]:
    return [
        f"    {'*' if path.stem == default else ' '} {path.stem:<16} {describe(path)}"
        for path in sorted((conf / group).glob("*.yaml"))
    ]


def _key_files(conf: Path) -> list[tuple[str, Path]]:
    """Return the files whose keys are listed: run.yaml and every group's default option."""
    files = [("", conf / "run.yaml")]
    for group, option in default_options(conf).items():
        if option is not None:
            path = conf / group / f"{option}.yaml"
            whole = "@package _global_" in path.read_text(encoding="utf-8")
            files.append(("" if whole else f"{group}.", path))
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
