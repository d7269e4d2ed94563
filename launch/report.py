"""``kuroshio report RUN``: one self-contained HTML page of a run."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from launch import run_folder
from launch.planning import plan_config
from trainer.config import load_config
from trainer.errors import ConfigError
from trainer.metrics.run_facts import SUBMISSION_NAME

LOG = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    """Write the page and print its path.

    Args:
        argv: arguments after the verb.

    Raises:
        ConfigError: when the folder is not a run's.
        StorageError: when the page cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="kuroshio report",
        description="Write one self-contained HTML page of a run, finished or still going: curves, "
        "throughput, memory, bits per character per source, configuration, environment, samples.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder (run_dir)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="HTML file to write (default: RUN/report.html)"
    )
    arguments = parser.parse_args(argv)
    from trainer.metrics.report import write_report  # matplotlib: not needed for --help

    print(write_report(arguments.run, arguments.out, plan_anew(arguments.run)))


def plan_anew(run_dir: Path) -> dict[str, Any] | None:
    """Return the plan of a run that was made without ``kuroshio submit``; None: there is one.

    None also where it cannot be planned any more, which is said: its model's folder may be gone.
    """
    path = run_dir / run_folder.CONFIG_FILE
    if (run_dir / SUBMISSION_NAME).exists() or not path.exists():
        return None
    try:
        plan = plan_config(load_config(run_folder.read(path)))
    except ConfigError as error:
        LOG.warning("%s cannot be planned, so the page compares with no plan: %s", run_dir, error)
        return None
    return None if plan is None else plan.as_dict()
