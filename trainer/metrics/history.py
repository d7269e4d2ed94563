"""What a run's folder says about it, finished or still going."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import ConfigError
from trainer.lives import read_lives
from trainer.metrics.journal import JOURNAL_NAME, read_journal
from trainer.metrics.redaction import redact

CONFIG_NAME = "config.yaml"
RECORD_KEYS = ("split", "step", "time", "event")  # book-keeping of every record
Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run's folder says."""

    run_dir: Path
    config: dict[str, Any]
    train: list[Record]
    evals: list[Record]
    samples: list[Record]
    events: list[Record]
    plots: list[Record]
    tables: list[Record]
    ranks: list[Record]
    lives: list[Record]

    @property
    def max_steps(self) -> int | None:
        """Step at which the run ends, if the config says."""
        return (self.config.get("loop") or {}).get("max_steps")

    @property
    def last_step(self) -> int:
        """Last recorded step."""
        return max(
            (record["step"] for record in (*self.train, *self.evals, *self.events)), default=0
        )

    def event(self, name: str) -> Record:
        """Return the last event of that name without its book-keeping, empty if there is none."""
        found = [event for event in self.events if event.get("event") == name]
        return {k: v for k, v in found[-1].items() if k not in RECORD_KEYS} if found else {}


def load_run(run_dir: Path) -> Run:
    """Read a run's folder, finished or not.

    Raises:
        ConfigError: when the folder is not a run's.
    """
    journal, config_path = run_dir / JOURNAL_NAME, run_dir / CONFIG_NAME
    if not journal.exists() and not config_path.exists():
        raise ConfigError(
            f"{run_dir} is not the folder of a run: it has neither {CONFIG_NAME} nor "
            f"{JOURNAL_NAME}; give the run_dir that `kuroshio run` printed"
        )
    config = yaml.safe_load(config_path.read_text("utf-8")) if config_path.exists() else {}
    splits: dict[str, list[Record]] = {"train": [], "eval": [], "sample": [], "event": []}
    splits |= {"plot": [], "table": [], "ranks": []}
    for record in read_journal(journal):
        splits.get(record["split"], []).append(record)
    # An evaluation done again after a resume replaces the one before.
    evals = {record["step"]: record for record in splits["eval"]}
    return Run(
        run_dir,
        redact(config or {}),
        splits["train"],
        [evals[step] for step in sorted(evals)],
        splits["sample"],
        splits["event"],
        last_of_each_title(splits["plot"]),
        last_of_each_title(splits["table"]),
        splits["ranks"],
        read_lives(run_dir),
    )


def last_of_each_title(records: Iterable[Record]) -> list[Record]:
    """Return the last record of each title, in the order in which the titles appeared."""
    return list({record["title"]: record for record in records}.values())
