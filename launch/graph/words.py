"""The words of a pipeline: of its file, and of the command line, for all runs or for one step."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from trainer.errors import ConfigError

REFERENCE = re.compile(r"@\{(?P<name>[^}]*)\}")
DIR = "dir"  # @{dir} = the pipeline's folder


@dataclass(frozen=True)
class Words:
    """The command line's words by what they are for."""

    folder: str | None
    for_all: list[str]
    for_one: dict[str, list[str]]


def split_words(words: Sequence[str], steps: Mapping[str, Any]) -> Words:
    """Sort the command line's words; an unknown STEP is left to the composition of every run.

    Raises:
        ConfigError: a word that is none.
    """
    given = Words(None, [], {})
    for word in words:
        key, equals, value = word.partition("=")
        step, dot, rest = key.lstrip("+~").partition(".")
        if not equals and not word.startswith("~"):
            raise ConfigError(f"{word!r} is neither KEY=VALUE nor STEP.KEY=VALUE")
        if key == "pipeline":
            continue  # it has led to the file
        if key == DIR:
            given = replace(given, folder=value)
        elif dot and step in steps:
            sign = key[: len(key) - len(key.lstrip("+~"))]
            given.for_one.setdefault(step, []).append(f"{sign}{rest}{equals}{value}")
        else:
            given.for_all.append(word)
    return given


def merge_words(words: Sequence[str]) -> list[str]:
    """Return ``words`` with the last one of every key, at its place."""
    merged: dict[str, str] = {}
    for word in words:
        key = word.partition("=")[0].lstrip("+~")
        merged.pop(key, None)
        merged[key] = word
    return list(merged.values())


def flatten_words(content: Any, where: str, problems: list[str]) -> Iterator[str]:
    """Yield the words of nested lists: a shared list stands in another as it is."""
    if isinstance(content, list):
        for item in content:
            yield from flatten_words(item, where, problems)
    elif isinstance(content, str) and ("=" in content or content.startswith("~")):
        yield content
    else:
        problems.append(f"{where}: {content!r} is no KEY=VALUE; put quotes around the whole word")


def set_values(
    content: Any, words: Sequence[str], where: str, problems: list[str]
) -> dict[str, Any]:
    """Return a step's own mapping with the command line's values in it."""
    if not isinstance(content, dict):
        problems.append(f"{where}: expected a mapping")
        return {}
    values = dict(content)
    for word in words:
        key, _, value = word.partition("=")
        try:
            values[key] = value if REFERENCE.match(value) else yaml.safe_load(value)
        except yaml.YAMLError:
            problems.append(f"{where}: {key}={value}: cannot be read; quote it as in YAML")
    return values
