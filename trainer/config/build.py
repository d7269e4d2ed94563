"""Plain data → dataclasses, with every unknown key and wrong type reported at once."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """Return ``; did you mean a, b?`` for the known words closest to ``word``, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


def build(cls: type[T], values: Mapping[str, Any], where: str, problems: list[str]) -> T | None:
    """Build dataclass ``cls`` from plain ``values``; append what is wrong to ``problems``.

    Args:
        cls: a dataclass type.
        values: the section as nested dicts.
        where: dotted key of the section, for messages.
        problems: list that messages are appended to.

    Returns:
        The instance, or None if this section had a problem.
    """
    before = len(problems)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in fields:
            problems.append(f"{prefix}{key} is not a known key{nearest(str(key), fields)}")
    kwargs = {}
    for key, spec in fields.items():
        if key in values:
            kwargs[key] = _convert(values[key], hints[key], f"{prefix}{key}", problems)
        elif spec.default is spec.default_factory is dataclasses.MISSING:
            problems.append(f"{prefix}{key} is missing; give it a value")
    return cls(**kwargs) if len(problems) == before else None


def _convert(value: Any, hint: Any, where: str, problems: list[str]) -> Any:
    """Check ``value`` against the type ``hint``; convert nested sections and int → float."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(typing.cast(type, hint), value, where, problems)
    if origin in (Union, types.UnionType):
        trials: list[list[str]] = []
        for option in args:
            trials.append([])
            result = _convert(value, option, where, trials[-1])
            if not trials[-1]:
                return result
        problems.append(min(trials, key=len)[0])
        return None
    if origin is Literal:
        if value in args and not isinstance(value, bool):
            return value
        expected = "|".join(map(str, args))
        problems.append(
            f"{where}={value!r}: expected {expected}{nearest(str(value), map(str, args))}"
        )
        return None
    if origin is list and isinstance(value, (list, tuple)):
        return [_convert(v, args[0], f"{where}[{i}]", problems) for i, v in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {str(k): _convert(v, args[1], f"{where}.{k}", problems) for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = origin or hint
    if isinstance(value, plain) and not (isinstance(value, bool) and plain is not bool):
        return value
    name = "null" if plain is type(None) else plain.__name__
    problems.append(f"{where}={value!r}: expected {name}, got {type(value).__name__}")
    return None
