"""``kuroshio doctor``: is this machine, or are these nodes, fit for a run?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from launch.checks import machine, table
from launch.checks.finding import Finding, as_data, exit_code
from launch.compose import compose_config
from trainer.errors import ConfigError


def main(arguments: Sequence[str]) -> int:
    """Look, show what was found, and return 78 when a run would fail of it, else 0."""
    options = _parse(arguments)
    config = compose_config(options.overrides)
    return report(machine.examine(config), options.json)


def report(findings: list[Finding], as_json: bool) -> int:
    """Print ``findings``; return the exit code they stand for."""
    if as_json:
        print(json.dumps(as_data(findings), ensure_ascii=False, indent=1))
    else:
        table.show(findings)
    return exit_code(findings)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kuroshio doctor", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options, overrides = parser.parse_known_args(arguments)
    unknown = [word for word in overrides if word.startswith("-")]
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)}: no such flag; `kuroshio doctor --help` lists them, everything "
            "else is KEY=VALUE or GROUP=OPTION"
        )
    options.overrides = overrides
    return options
