"""Words of the verbs that take a model: positional ones first, then KEY=VALUE."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from launch.compose import compose_verb
from trainer.config import build
from trainer.errors import ConfigError


def split_words(
    verb: str, arguments: Sequence[str], places: Sequence[str]
) -> tuple[list[Path], list[str]]:
    """Return the paths that ``places`` names, and the overrides after them.

    Raises:
        ConfigError: a path is missing, or a word that is no KEY=VALUE follows.
    """
    usage = f"usage: kuroshio {verb} {' '.join(places)} [KEY=VALUE]..."
    given, overrides = list(arguments[: len(places)]), list(arguments[len(places) :])
    for number, place in enumerate(places):
        word = given[number] if number < len(given) else ""
        if not word or word.startswith("-") or ("=" in word and not Path(word).exists()):
            raise ConfigError(f"{place} is missing{f' before {word}' if word else ''}; {usage}")
    for word in overrides:
        if "=" not in word:
            raise ConfigError(f"{word!r} is not KEY=VALUE; {usage}")
    return [Path(word) for word in given], overrides


def read_options(verb: str, overrides: Sequence[str], *classes: type) -> tuple[Any, ...]:
    """Return one instance of each dataclass, filled from ``conf/VERB.yaml`` and ``overrides``.

    Keys that hold text take it as it is typed, without quotes for Hydra's grammar: a persona is no
    expression.

    Raises:
        ConfigError: with every problem found, one per line.
    """
    hints = {key: hint for cls in classes for key, hint in get_type_hints(cls).items()}
    texts = {key for key, hint in hints.items() if hint in (str, str | None)}
    lists = {key for key, hint in hints.items() if hint == list[str]}
    tables = {key for key, hint in hints.items() if hint == dict[str, str]}
    literal: dict[str, Any] = {}
    parsed = []
    for word in overrides:
        key, _, value = word.partition("=")
        if key in texts:
            literal[key] = None if value == "null" else _unquote(value)
        elif key in lists and not value.startswith("["):
            literal[key] = [_unquote(value)]
        elif key.partition(".")[0] in tables and "." in key:
            table, _, name = key.partition(".")
            literal.setdefault(table, {})[name] = _unquote(value)
        else:
            parsed.append(word)
    values = compose_verb(verb, parsed) | literal
    problems: list[str] = []
    built: list[Any] = []
    for cls in classes:
        names = {field.name for field in dataclasses.fields(cls)}
        section = {key: value for key, value in values.items() if key in names}
        built.append(build(cls, section, "", problems))
    for instance in built:
        if instance is not None:
            problems += instance.problems()
    if problems:
        raise ConfigError("\n".join(problems))
    return tuple(built)


def _unquote(value: str) -> str:
    """Return ``value`` without the quotes that Hydra's grammar would want around it."""
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if quoted else value
