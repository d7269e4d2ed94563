"""``conf/pipeline/NAME.yaml`` and the command line's words → steps with their parents."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Literal

import yaml

from launch import ROOT
from trainer.config import build, nearest
from trainer.errors import ConfigError

FOLDER = ROOT / "conf" / "pipeline"
Kind = Literal["run", "export", "tokenizer"]
REFERENCE = re.compile(r"@\{(?P<name>[^}]*)\}")
DIR = "dir"  # @{dir} = the pipeline's folder
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


@dataclass(frozen=True)
class _Words:
    """The command line's words by what they are for."""

    pipeline: str
    folder: str | None
    for_all: list[str]
    for_one: dict[str, list[str]]


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
    file = _find(words, folder)
    values = _read_yaml(file)
    steps = values.get("steps")
    if not isinstance(steps, dict) or not any("run" in (step or {}) for step in steps.values()):
        raise ConfigError(f"{file}: steps holds no run; name at least one step with `run`")
    given = _split(words, steps)
    place = given.folder or str(values.get(DIR) or f"runs/{file.stem}")
    if absolute:
        place = str(Path(place).absolute())
    problems = _check_names(file, values, steps)
    if not _PLAIN_PATH.fullmatch(place):
        problems.append(f"dir={place!r}: use letters, digits and _ . / + - only")
    built = [
        step
        for name, section in steps.items()
        if (step := _build_step(file, str(name), section, given, Path(place), steps, problems))
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    ordered = _in_order(file, {step.name: step for step in built})
    return Pipeline(file.stem, file, Path(place), tuple(words), ordered)


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


def _split(words: Sequence[str], steps: Mapping[str, Any]) -> _Words:
    """Sort the command line's words; an unknown STEP is left to the composition of every run."""
    given = _Words("", None, [], {})
    for word in words:
        key, equals, value = word.partition("=")
        step, dot, rest = key.lstrip("+~").partition(".")
        if not equals and not word.startswith("~"):
            raise ConfigError(f"{word!r} is neither KEY=VALUE nor STEP.KEY=VALUE")
        if key == "pipeline":
            given = replace(given, pipeline=value)
        elif key == DIR:
            given = replace(given, folder=value)
        elif dot and step in steps:
            sign = key[: len(key) - len(key.lstrip("+~"))]
            given.for_one.setdefault(step, []).append(f"{sign}{rest}{equals}{value}")
        else:
            given.for_all.append(word)
    return given


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


def _build_step(
    file: Path,
    name: str,
    section: Any,
    given: _Words,
    place: Path,
    steps: Mapping[str, Any],
    problems: list[str],
) -> Step | None:
    """Return a step, or None with its problems noted."""
    where = f"{file}: steps.{name}"
    kinds = ("run", "export", "tokenizer")
    if not isinstance(section, dict) or len(section) != 1 or next(iter(section)) not in kinds:
        problems.append(f"{where}: expected one of {', '.join(kinds)} with what it needs")
        return None
    kind, content = next(iter(section.items()))
    own = given.for_one.get(name, [])
    parents: list[str] = []

    def resolve(text: str) -> str:
        return REFERENCE.sub(lambda match: _folder_of(match["name"], name), text)

    def _folder_of(target: str, user: str) -> str:
        if target == DIR:
            return str(place)
        if target not in steps or target == user:
            problems.append(f"{where}: @{{{target}}} is no other step{nearest(target, steps)}")
        elif target not in parents:
            parents.append(target)
        return str(place / target)

    if kind == "run":
        words = merge_words([*_flatten(content, where, problems), *given.for_all, *own])
        resolved = tuple(resolve(word) for word in words)
        return Step(name, "run", place / name, tuple(parents), words=resolved)
    cls: type[ExportOptions | TokenizerOptions] = (
        ExportOptions if kind == "export" else TokenizerOptions
    )
    values = _with_words(content, own, where, problems)
    options = build(cls, _map_text(values, resolve), where, problems)
    if isinstance(options, ExportOptions) and len(parents) != 1:
        problems.append(f"{where}: run={values.get('run')!r}: name one run as @{{STEP}}")
    return Step(name, kind, place / name, tuple(parents), options=options) if options else None


def merge_words(words: Sequence[str]) -> list[str]:
    """Return ``words`` with the last one of every key, at its place."""
    last = {word.partition("=")[0].lstrip("+~"): word for word in words}
    return [w for i, w in enumerate(words) if last[_key(w)] is w and _key(w) not in _keys(words, i)]


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _keys(words: Sequence[str], index: int) -> set[str]:
    return {_key(word) for word in words[index + 1 :]}


def _flatten(content: Any, where: str, problems: list[str]) -> Iterator[str]:
    """Yield the words of nested lists: a shared list stands in another as it is."""
    if isinstance(content, list):
        for item in content:
            yield from _flatten(item, where, problems)
    elif isinstance(content, str) and ("=" in content or content.startswith("~")):
        yield content
    else:
        problems.append(f"{where}: {content!r} is no KEY=VALUE; put quotes around the whole word")


def _with_words(
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


def _map_text(value: Any, change: Any) -> Any:
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
