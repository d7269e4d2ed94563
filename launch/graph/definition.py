"""``conf/pipeline/NAME.yaml`` and the command line's words → steps with their parents."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from launch import ROOT
from launch.graph.words import (
    DIR,
    REFERENCE,
    Words,
    flatten_words,
    merge_words,
    set_values,
    split_words,
)
from launch.secrets import flatten, refuse_secrets
from trainer.config import build, nearest
from trainer.errors import ConfigError

FOLDER = ROOT / "conf" / "pipeline"
Kind = Literal["run", "export", "tokenizer"]
_STEP_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./+-]+")  # as it stands in overrides and job scripts
_RESERVED = {"all", "steps", DIR}


@dataclass(frozen=True)
class ExportOptions:
    """What ``kuroshio export`` is given; its flags by these names."""

    run: str  # @{STEP}
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    adapter: bool = False
    base: Literal["original", "dequantized"] = "original"
    max_shard_gb: float = 4.0


@dataclass(frozen=True)
class TokenizerOptions:
    """A SentencePiece tokenizer trained on texts, for a model that starts from scratch."""

    paths: list[str]
    vocab_size: int
    text_columns: list[str] = field(default_factory=lambda: ["text"])


@dataclass(frozen=True)
class Step:
    """One step: what it does, with every reference to a parent replaced by its folder."""

    name: str
    kind: Kind
    folder: Path
    parents: tuple[str, ...]
    words: tuple[str, ...] = ()  # of a run: its overrides
    options: ExportOptions | TokenizerOptions | None = None  # of the other kinds


@dataclass(frozen=True)
class Pipeline:
    """The steps of a pipeline, each after its parents."""

    name: str
    file: Path
    folder: Path
    overrides: tuple[str, ...]  # as they were typed
    steps: Mapping[str, Step]

    def descendants(self, name: str) -> list[str]:
        """Return the steps that need ``name``, directly or through others."""
        found = {name}
        for step in self.steps.values():
            if found.intersection(step.parents):
                found.add(step.name)
        return [step for step in self.steps if step in found and step != name]


def names(folder: Path = FOLDER) -> list[str]:
    """Return the pipelines there are."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def is_pipeline(words: Sequence[str]) -> bool:
    """Say whether a verb's words ask for a pipeline."""
    return any(word.startswith("pipeline=") for word in words)


def read_pipeline(words: Sequence[str], absolute: bool = False, folder: Path = FOLDER) -> Pipeline:
    """Return the pipeline that the words of a verb ask for.

    Args:
        words: ``pipeline=NAME`` (or a ``.yaml`` file), ``dir=FOLDER``, ``KEY=VALUE`` for every run
            that it holds and ``STEP.KEY=VALUE`` for one step.
        absolute: write the pipeline's folder out from the root, for jobs.
        folder: of the pipelines that go by a name.

    Raises:
        ConfigError: no such pipeline, or with every problem of its file and the words.
    """
    refuse_secrets(word.partition("=")[::2] for word in words)
    file = _find(words, folder)
    values = _read_yaml(file)
    refuse_secrets(flatten(values))
    steps = values.get("steps")
    if not isinstance(steps, dict) or not any(_is_run(step) for step in steps.values()):
        raise ConfigError(f"{file}: steps holds no run; name at least one step with `run`")
    given = split_words(words, steps)
    place = given.folder or str(values.get(DIR) or f"runs/{file.stem}")
    if absolute:
        place = str(Path(place).absolute())
    problems = _check_names(file, values, steps)
    if not _PLAIN_PATH.fullmatch(place):
        problems.append(f"dir={place!r}: use letters, digits and _ . / + - only")
    reader = _Reader(file, Path(place), steps, given)
    found = [reader.build(str(name), section) for name, section in steps.items()]
    built = [step for step in found if step is not None]
    if problems := problems + reader.problems:
        raise ConfigError("\n".join(problems))
    ordered = _in_order(file, {step.name: step for step in built})
    return Pipeline(file.stem, file, Path(place), tuple(words), ordered)


def _is_run(section: Any) -> bool:
    return isinstance(section, dict) and "run" in section


def _find(words: Sequence[str], folder: Path) -> Path:
    asked = [word.partition("=")[2] for word in words if word.startswith("pipeline=")]
    if len(asked) != 1:
        raise ConfigError(f"pipeline={','.join(asked)}: give one pipeline")
    name = asked[0]
    file = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not file.is_file():
        known = names(folder)
        raise ConfigError(
            f"pipeline={name}: expected {'|'.join(known)} or a YAML file{nearest(name, known)}"
        )
    return file


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds no pipeline; it needs a mapping with `steps`")
    return values


def _check_names(file: Path, values: Mapping[str, Any], steps: Mapping[str, Any]) -> list[str]:
    known = ("dir", "words", "steps")
    problems = [
        f"{file}: {key} is not a known key{nearest(str(key), known)}"
        for key in values
        if key not in known
    ]
    taken = _config_keys() | _RESERVED
    for name in map(str, steps):
        if not _STEP_NAME.fullmatch(name):
            problems.append(f"{file}: step {name!r}: use letters, digits and _, a letter first")
        elif name in taken:
            problems.append(f"{file}: step {name!r}: {name}.KEY=VALUE means the config's own keys")
    return problems


def _config_keys() -> set[str]:
    """Return the first parts of a config's keys, and its groups."""
    values = yaml.safe_load((ROOT / "conf" / "run.yaml").read_text(encoding="utf-8"))
    groups = {key for entry in values["defaults"] if isinstance(entry, dict) for key in entry}
    return {*values, *groups} - {"defaults"}


class _Reader:
    """Builds the steps of one file; collects what is wrong with them."""

    def __init__(self, file: Path, place: Path, steps: Mapping[str, Any], given: Words) -> None:
        self.file, self.place, self.steps, self.given = file, place, steps, given
        self.problems: list[str] = []

    def build(self, name: str, section: Any) -> Step | None:
        """Return a step, or None with its problems noted."""
        where, kinds = f"{self.file}: steps.{name}", get_args(Kind)
        if not isinstance(section, dict) or len(section) != 1 or next(iter(section)) not in kinds:
            self.problems.append(f"{where}: expected one of {', '.join(kinds)} with what it needs")
            return None
        kind, content = next(iter(section.items()))
        own, folder = self.given.for_one.get(name, []), self.place / name
        if kind == "run":
            shared = flatten_words(content, where, self.problems)
            words = merge_words([*shared, *self.given.for_all, *own])
            resolved, parents = self.resolve(name, words)
            return Step(name, "run", folder, parents, words=tuple(resolved))
        values, parents = self.resolve(name, set_values(content, own, where, self.problems))
        cls: type[ExportOptions | TokenizerOptions] = (
            ExportOptions if kind == "export" else TokenizerOptions
        )
        options = build(cls, values, where, self.problems)
        if isinstance(options, ExportOptions) and len(parents) != 1:
            self.problems.append(f"{where}: run={options.run!r}: name one run as @{{STEP}}")
        return Step(name, kind, folder, parents, options=options) if options else None

    def resolve(self, name: str, content: Any) -> tuple[Any, tuple[str, ...]]:
        """Replace every reference in a step's ``content`` by a folder; return the parents too."""
        parents: dict[str, None] = {}

        def folder_of(match: re.Match[str]) -> str:
            target = match["name"]
            if target == DIR:
                return str(self.place)
            if target not in self.steps or target == name:
                hint = nearest(target, self.steps)
                self.problems.append(
                    f"{self.file}: steps.{name}: @{{{target}}} is no other step{hint}"
                )
            parents[target] = None
            return str(self.place / target)

        resolved = _map_text(content, lambda text: REFERENCE.sub(folder_of, text))
        return resolved, tuple(parents)


def _map_text(value: Any, change: Callable[[str], str]) -> Any:
    """Return nested values with every text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_text(item, change) for item in value]
    if isinstance(value, dict):
        return {key: _map_text(item, change) for key, item in value.items()}
    return value


def _in_order(file: Path, steps: dict[str, Step]) -> dict[str, Step]:
    """Return the steps in the order of the file, each after its parents.

    Raises:
        ConfigError: a circle.
    """
    try:
        TopologicalSorter({name: step.parents for name, step in steps.items()}).prepare()
    except CycleError as error:
        raise ConfigError(f"{file}: a circle: {' -> '.join(error.args[1])}") from error
    ordered: dict[str, Step] = {}
    while len(ordered) < len(steps):
        ready = (
            s for s in steps.values() if s.name not in ordered and set(s.parents) <= {*ordered}
        )
        first = next(ready)
        ordered[first.name] = first
    return ordered
