"""``kuroshio report RUN``: one self-contained HTML page of a run."""

from __future__ import annotations

import argparse
from pathlib import Path


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

    print(write_report(arguments.run, arguments.out))
