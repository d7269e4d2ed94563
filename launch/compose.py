"""From the command line's overrides to a checked run configuration (the only importer of hydra)."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch import ROOT
from launch.secrets import flatten, refuse_secrets
from trainer.config import RunConfig, load_config, nearest
from trainer.errors import ConfigError

CONF = ROOT / "conf"
REQUIRED = "\0required "  # what ${required:WHAT} in an option's file becomes unless it is set
NO_GROUPS = ("pipeline",)  # folders of conf/ whose files are no part of a run
COMPOSITION_ONLY = ("data_root",)  # keys that other values refer to; no part of a run's config


def compose_config(overrides: Sequence[str], conf: Path = CONF) -> RunConfig:
    """Compose and check a config for verbs that do not run its stage, whose import takes seconds.

    Raises:
        ConfigError: with every problem found, one per line.
    """
    return load_config(compose_values(overrides, conf))


def compose_values(overrides: Sequence[str], conf: Path = CONF) -> dict[str, Any]:
    """Compose ``conf/run.yaml`` with ``overrides`` into plain data.

    Raises:
        ConfigError: for words that are no overrides, unknown groups, options and keys (each with
            the nearest names), values that are missing and values that look like secrets.
    """
    refuse_secrets(_pairs(overrides))
    with _hydra(conf):
        chosen, settings = _choose(_parse_all(overrides, conf), conf)
        try:
            values = _resolve(_compose(list(overrides)))
        except ConfigError:
            _check_keys(settings, _compose(chosen))  # names the nearest keys, which Hydra does not
            raise
    refuse_secrets(flatten(values))
    return values


def compose_verb(verb: str, overrides: Sequence[str], conf: Path = CONF) -> dict[str, Any]:
    """Compose ``conf/VERB.yaml``, which has no groups, with ``overrides`` into plain data.

    Raises:
        ConfigError: for words that are no overrides, unknown keys (each with the nearest names)
            and values that look like secrets.
    """
    refuse_secrets(_pairs(overrides))
    with _hydra(conf):
        settings = _parse_all(overrides, conf)
        try:
            return _resolve(_compose(list(overrides), verb))
        except ConfigError:
            _check_keys(settings, _compose([], verb))
            raise


def expand_sweep(overrides: Sequence[str], conf: Path = CONF) -> tuple[list[str], list[list[str]]]:
    """Return the words that all runs of a sweep share, and for each swept key its words.

    ``KEY=A,B`` and Hydra's ``range`` and ``choice`` sweep.

    Raises:
        ConfigError: for words that are no overrides, and a sweep over files.
    """
    shared: list[str] = []
    swept: list[list[str]] = []
    for word in overrides:
        override = _parse(word, conf, sweeping=True)
        if not override.is_sweep_override():
            shared.append(word)
            continue
        key = word.partition("=")[0]
        try:
            values = list(override.sweep_string_iterator())
        except HydraException as error:
            raise ConfigError(f"{word}: {error}; list the values as {key}=A,B") from error
        swept.append([f"{key}={value}" for value in values])
    return shared, swept


def group_options(conf: Path = CONF) -> dict[str, list[str]]:
    """Return the options of every config group, read from the folders of ``conf``."""
    folders = sorted(p for p in conf.iterdir() if p.is_dir() and p.name not in NO_GROUPS)
    return {p.name: sorted(f.stem for f in p.glob("*.yaml")) for p in folders}


def run_completion(action: str, conf: Path = CONF) -> None:
    """Print what Hydra's plugin says for ``install=SHELL``, ``uninstall=SHELL``, ``query=SHELL``.

    Raises:
        ConfigError: when Hydra has no completion for that shell.
    """
    sys.argv[0] = "kuroshio"  # the name that the shell code completes for
    with _hydra(conf):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        try:
            hydra.shell_completion("run", [action])
        except ValueError as error:
            raise ConfigError(f"-sc {action}: {error}") from error


@contextmanager
def _hydra(conf: Path) -> Iterator[None]:
    """Initialise Hydra on ``conf`` for the length of a block; it writes no files."""
    # The schema comes first in run.yaml's defaults, so that every field of every section can be
    # set although an option's file lists only the values it is about.
    ConfigStore.instance().store("schema", _schema(), package="_global_")
    OmegaConf.register_new_resolver("required", lambda what: REQUIRED + what, replace=True)
    with initialize_config_dir(str(conf), job_name="kuroshio", version_base="1.3"):
        yield


def _schema() -> dict[str, Any]:
    """Return the defaults of every fixed section as plain data."""
    hints = get_type_hints(RunConfig)
    sections = {k: v for k, v in hints.items() if isinstance(v, type) and is_dataclass(v)}
    return {name: _field_defaults(hint) for name, hint in sections.items()}


def _field_defaults(section: type) -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    for f in dataclasses.fields(section):
        if f.default is not dataclasses.MISSING:
            defaults[f.name] = f.default
        elif f.default_factory is not dataclasses.MISSING:
            made = f.default_factory()
            nested = is_dataclass(made) and not isinstance(made, type)
            defaults[f.name] = dataclasses.asdict(made) if nested else made
    return defaults


def _pairs(overrides: Iterable[str]) -> Iterator[tuple[str, str]]:
    for word in overrides:
        key, _, value = word.partition("=")
        yield key.lstrip("+~"), value


def _parse(word: str, conf: Path, sweeping: bool = False) -> Override:
    key, equals, _ = word.partition("=")
    if re.match(r"hydra\b", key.lstrip("+~")):
        raise ConfigError(
            f"{key}: keys of Hydra itself choose plugins, folders and callbacks; a run has none "
            "of them. Hydra only composes the config here: leave the word out"
        )
    if not equals and not word.startswith("~"):
        groups = [group for group, options in group_options(conf).items() if word in options]
        hint = (
            f"; did you mean {', '.join(f'{group}={word}' for group in groups)}?" if groups else ""
        )
        raise ConfigError(f"{word!r} is neither KEY=VALUE nor GROUP=OPTION{hint}")
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{key}: its value cannot be read ({reason}); put quotes around it: {key}='\"VALUE\"'"
        ) from error
    if override.is_sweep_override() and not sweeping:
        raise ConfigError(
            f"{key}: several values at once; --multirun starts one run for each, a list is "
            f"{key}=[A,B]"
        )
    return override


def _parse_all(overrides: Sequence[str], conf: Path) -> list[Override]:
    parsed, problems = [], []
    for word in overrides:
        try:
            parsed.append(_parse(word, conf))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return parsed


def _choose(parsed: Iterable[Override], conf: Path) -> tuple[list[str], list[Override]]:
    """Split overrides into words that choose a group's option and those that set a value."""
    groups = group_options(conf)
    chosen: list[str] = []
    settings: list[Override] = []
    problems: list[str] = []
    for override in parsed:
        group, option = override.key_or_group, override.value()
        if group not in groups:
            settings.append(override)
        elif option is None and not override.is_delete():
            problems.append(f"{group}=null: to leave a group out, leave the word out, or ~{group}")
        elif option is None or option in groups[group]:
            chosen.append(str(override.input_line))
        else:
            known = "|".join(groups[group])
            problems.append(
                f"{group}={option}: expected {known}{nearest(str(option), groups[group])}"
            )
    if problems:
        raise ConfigError("\n".join(problems))
    return chosen, settings


def _compose(overrides: list[str], primary: str = "run") -> DictConfig:
    try:
        return hydra_compose(primary, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        words = overrides or "no overrides"
        raise ConfigError(f"conf/{primary}.yaml with {words}: {error}") from error


def _check_keys(settings: Iterable[Override], known: DictConfig) -> None:
    """Raise ConfigError for every setting whose key the composed config does not have."""
    keys = set(_dotted_keys(OmegaConf.to_container(known, resolve=False)))
    problems = [
        f"{override.key_or_group} is not a known key{_nearest_keys(override.key_or_group, keys)}"
        for override in settings
        if not override.is_add() and override.key_or_group not in keys
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _dotted_keys(values: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield f"{prefix}{key}"
            yield from _dotted_keys(value, f"{prefix}{key}.")


def _nearest_keys(key: str, known: Iterable[str]) -> str:
    """Return ``; did you mean …?`` with keys of the same last part first, then similar ones."""
    leaf = key.rpartition(".")[2]
    by_leaf: dict[str, list[str]] = {}
    for name in sorted(known):
        by_leaf.setdefault(name.rpartition(".")[2], []).append(name)
    close = [*by_leaf.get(leaf, ())]
    close += difflib.get_close_matches(key, list(known), n=3, cutoff=0.75)
    for similar in difflib.get_close_matches(leaf, by_leaf, n=3, cutoff=0.75):
        close += by_leaf[similar]
    names = list(dict.fromkeys(close))[:3]
    return f"; did you mean {', '.join(names)}?" if names else ""


def _resolve(composed: DictConfig) -> dict[str, Any]:
    """Return the composed config as plain data with every interpolation replaced by its value."""
    try:
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {error.msg}") from error
    assert isinstance(values, dict)
    missing = [
        f"{key} has no value; give {key}={value.removeprefix(REQUIRED)}"
        for key, value in flatten(values)
        if isinstance(value, str) and value.startswith(REQUIRED)
    ]
    if missing:
        raise ConfigError("\n".join(missing))
    return {str(key): value for key, value in values.items() if key not in COMPOSITION_ONLY}
