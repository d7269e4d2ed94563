"""From plain data to a run that passed every check."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from launch.secrets import open_file_problems
from trainer.config import RunConfig, build, validate
from trainer.errors import ConfigError
from trainer.stage import Stage
from trainer.stages import build_stage, stage_section


@dataclass(frozen=True)
class Run:
    """A run that passed every check: its config and its stage."""

    config: RunConfig
    stage: Stage


def build_run(values: dict[str, Any]) -> Run:
    """Build the config and its stage from plain ``values`` (composed, or read from a frozen file).

    Raises:
        ConfigError: with every problem of the config, the stage and between the two.
    """
    problems: list[str] = []
    config = build(RunConfig, values, "", problems)
    section = values.get("stage")
    stage = build_stage(section, problems) if isinstance(section, dict) else None
    if config is not None:
        problems += validate(config)
        if config.log.wandb == "online":
            problems += open_file_problems(os.environ)
        if stage is not None:
            problems += stage.check(config)
    if problems or config is None or stage is None:
        raise ConfigError("\n".join(problems))
    whole = stage_section(stage, str(config.stage["name"]))  # defaults written out
    return Run(dataclasses.replace(config, stage=whole), stage)


def complete_section(section: dict[str, Any]) -> dict[str, Any]:
    """Return a frozen ``stage`` section with the defaults of fields that are newer than it."""
    stage = build_stage(section, [])
    return section if stage is None else stage_section(stage, str(section["name"]))


def settle(run: Run) -> tuple[Run, list[str]]:
    """Fill in what only the model and the prepared data can tell: the run as it will be frozen.

    Returns:
        The run, and remarks for the user.

    Raises:
        DataError: the data is not prepared.
    """
    config, remarks = run.stage.settle(run.config)
    return dataclasses.replace(run, config=config), remarks
