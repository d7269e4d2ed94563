"""Every YAML composes, builds its dataclasses and documents itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from launch.compose import CONF, compose_values, group_options
from launch.help import default_options, describe
from trainer.config import RunConfig, load_config
from trainer.errors import ConfigError
from trainer.stages import SINGLE_PROCESS, STAGES, stage_class

OPTIONS = [(group, option) for group, names in group_options().items() for option in names]
NEEDS = {"loss": ("stage=dpo", "model=folder")}  # of a group: without these it has no place
FILES = sorted(CONF.rglob("*.yaml"))


def compose_option(*words: str) -> dict[str, Any]:
    """Compose with options, giving whatever they say that the user must give."""
    try:
        return compose_values(words)
    except ConfigError as error:
        keys = [line.partition(" has no value; give ")[0] for line in str(error).splitlines()]
        values = {key: "[given]" if key.endswith("paths") else "given" for key in keys}
        return compose_values([*words, *(f"{key}={value}" for key, value in values.items())])


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=[f"{g}={o}" for g, o in OPTIONS])
def test_option_composes_and_builds(group: str, option: str) -> None:
    words = [f"{group}={option}", *NEEDS.get(group, ())]
    config = load_config(compose_option(*words))
    if group not in ("data", "experiment", "debug", "cluster"):
        names = {"stage": config.stage["name"], "model": config.model.name}
        names["loss"] = config.stage.get("objective", {}).get("name")
        named = names.get(group, option)
        assert named == option or group == "model"


@pytest.mark.parametrize(
    ("engine", "stage", "optimizer", "params"),
    [
        ("zero0", 0, "none", "none"),
        ("zero1", 1, "none", "none"),
        ("zero2", 2, "none", "none"),
        ("zero2_offload", 2, "cpu", "none"),
        ("zero3", 3, "none", "none"),
        ("zero3_offload", 3, "cpu", "cpu"),
        ("zero3_nvme", 3, "nvme", "nvme"),
    ],
)
def test_engine_options_mean_what_they_say(
    engine: str, stage: int, optimizer: str, params: str
) -> None:
    found = load_config(compose_option(f"engine={engine}"))
    got = (found.engine.zero_stage, found.engine.offload_optimizer, found.engine.offload_params)
    assert got == (stage, optimizer, params)


def test_groups_are_those_of_the_defaults_list() -> None:
    assert set(group_options()) == set(default_options())


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(CONF)) for p in FILES])
def test_file_is_data_and_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "_target_" not in text and "/home/" not in text and "/work/" not in text
    assert describe(path)
    packaged = path.parent.name in ("stage", "experiment", "debug")
    assert ("# @package _global_" in text.splitlines()[0]) == packaged


def test_yaml_defaults_are_the_dataclass_defaults() -> None:
    """The value --help shows is the one a config built without YAML gets."""
    for name, hint in get_type_hints(RunConfig).items():
        if not dataclasses.is_dataclass(hint) or name == "model":
            continue
        section = yaml_section(name)
        defaults = field_defaults(hint)
        assert {k: v for k, v in section.items() if k in defaults} == defaults, name


def yaml_section(name: str) -> dict[str, Any]:
    option = default_options().get(name)
    path = CONF / name / f"{option}.yaml" if option else CONF / "run.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return dict(values if option else values[name])


def field_defaults(section: Any) -> dict[str, Any]:
    fields = dataclasses.fields(section)
    plain = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    made = {f.name: f.default_factory() for f in fields if callable(f.default_factory)}
    nested = {n: dataclasses.asdict(v) for n, v in made.items() if dataclasses.is_dataclass(v)}  # type: ignore
    return plain | made | nested


@pytest.mark.parametrize("name", STAGES)
def test_stage_file_lists_every_field_of_its_class(name: str) -> None:
    path = CONF / "stage" / f"{name}.yaml"
    section = yaml.safe_load(path.read_text(encoding="utf-8"))["stage"]
    fields = {f.name for f in dataclasses.fields(stage_class(name))}  # type: ignore[arg-type]
    assert set(section) == fields | {"name"}
    assert section["name"] == name == stage_class(name).name
    assert (name in SINGLE_PROCESS) == stage_class(name).single_process
