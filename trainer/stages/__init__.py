"""Stages by name; a stage's module is imported only when the stage is used."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from trainer.config import build, nearest
from trainer.errors import ConfigError
from trainer.stage import Stage

STAGES: dict[str, str] = {
    "dpo": "trainer.stages.dpo:Dpo",
    "ppo": "trainer.stages.ppo:Ppo",
    "pretrain": "trainer.stages.pretrain:Pretrain",
    "reward": "trainer.stages.reward:Reward",
    "sft": "trainer.stages.sft:Sft",
    "vocab": "trainer.stages.vocab:Vocab",
}
# Stages that use no ranks; known here because importing a stage takes seconds.
SINGLE_PROCESS = frozenset({"vocab"})


def stage_class(name: str) -> type[Stage]:
    """Return the class of the stage called ``name``.

    Raises:
        ConfigError: when there is no such stage.
    """
    if name not in STAGES:
        known = "|".join(STAGES)
        raise ConfigError(f"stage.name={name!r}: expected {known}{nearest(name, STAGES)}")
    module, _, attribute = STAGES[name].partition(":")
    cls: type[Stage] = getattr(importlib.import_module(module), attribute)
    return cls


def build_stage(section: Mapping[str, Any], problems: list[str]) -> Stage | None:
    """Build the stage that the ``stage`` section of a config describes.

    Args:
        section: ``name`` and the stage's fields.
        problems: list that messages are appended to.

    Returns:
        The stage, or None when the section has a problem.
    """
    name = section.get("name")
    if not isinstance(name, str):
        problems.append(f"stage.name={name!r}: expected {'|'.join(STAGES)}")
        return None
    try:
        cls = stage_class(name)
    except ConfigError as error:
        problems.append(str(error))
        return None
    fields = {key: value for key, value in section.items() if key != "name"}
    return build(cls, fields, "stage", problems)


def stage_section(stage: Stage, name: str) -> dict[str, Any]:
    """Return ``stage`` as plain data that ``build_stage`` reads, every field written out."""
    return {"name": name, **dataclasses.asdict(stage)}  # type: ignore[call-overload]
