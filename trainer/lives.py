"""``lives.jsonl``: when and where each life of a run started, how it ended, what came of it.

A life writes a line when it starts and one when it ends; a job script adds what it decided. Lines
are short and appended whole, so that no reader has to wait for a writer. Standard library only:
the end of a job and the commands of a login node read this without torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

LIVES_NAME = "lives.jsonl"
CHECKPOINTS_NAME = "checkpoints"
STOP_NAME = "stop"  # in the run folder: made by the user, removed by the run that honours it
ATTEMPT_KEY = "KUROSHIO_ATTEMPT"  # set by the job script
BEGUN_NAME = "begun.json"  # in the folder of a save under way: which step, since when, why
Life = dict[str, Any]


def utc_now() -> str:
    """Return the time as ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def slurm_life(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return which life of which Slurm job this is.

    ``job`` is None outside of one, ``restart`` counts how often Slurm has requeued it, and
    ``attempt`` how often its script has started the ranks again since then.
    """
    return {
        "job": environ.get("SLURM_JOB_ID"),
        "restart": int(environ.get("SLURM_RESTART_COUNT") or 0),
        "attempt": int(environ.get(ATTEMPT_KEY) or 0),
    }


def life_number(life: Mapping[str, Any]) -> tuple[int, int]:
    """Return ``restart`` and ``attempt``, by which the lives of one job are in order."""
    return int(life.get("restart") or 0), int(life.get("attempt") or 0)


def append_line(run_dir: Path, record: Mapping[str, Any]) -> None:
    """Append one line; an OSError is the caller's to explain."""
    line = json.dumps(dict(record), ensure_ascii=False) + "\n"
    descriptor = os.open(run_dir / LIVES_NAME, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = f"\n{line}"  # the line before was torn, and must not take this one with it
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read_lives(run_dir: Path) -> list[Life]:
    """Return the lives of a run in the order of their starts, each with its end as far as known.

    Fields of a start: ``started, token, host, job, restart, attempt, launcher, world_size,
    directory, first_step, changes, code, config`` (hashes of the last two); of an end: ``ended,
    exit_code, reason, cause, rank, step`` (newest checkpoint); of a job script's decision:
    ``decision, decision_reason``. A life that failed before it began has no ``started``.
    """
    lives: list[Life] = []
    for line in _read_lines(run_dir / LIVES_NAME):
        life = None if "started" in line else _find(lives, line)
        if life is None:
            lives.append(line)
        else:
            life |= {key: value for key, value in line.items() if value is not None}
    return lives


def _find(lives: list[Life], line: Life) -> Life | None:
    """Return the life that an end or a decision is of."""
    token, job = line.get("token"), line.get("job")
    if token is not None:
        found = [life for life in lives if life.get("token") == token]
    elif job is not None:
        own = (job, life_number(line))
        found = [life for life in lives if (life.get("job"), life_number(life)) == own]
    else:
        return None
    if not found or ("ended" in line and "ended" in found[-1]):
        return None
    return found[-1]


def _read_lines(path: Path) -> Iterator[Life]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for text in file:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):  # torn by a kill or a full disk
                continue
            if isinstance(line, dict):
                yield line


def cut_saves(run_dir: Path, token: int | None = None) -> list[str]:
    """Return, of saves that a life began and did not commit, what is known of each.

    Args:
        run_dir: the run's folder.
        token: of that life; None: of any.
    """
    life = "" if token is None else f".life_{token}"
    notes = (run_dir / CHECKPOINTS_NAME).glob(f".step_*{life}.tmp/{BEGUN_NAME}")
    return [_describe_cut(path) for path in sorted(notes)]


def _describe_cut(path: Path) -> str:
    """Say which save was cut off, and whether it had too little time after a request to stop."""
    step = path.parent.name[len(".step_") :].partition(".")[0]
    what = f"the save of step {int(step) if step.isdecimal() else step} was cut off"
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        begun, stop = note["begun"], note["stop"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # cut off in it
        return f"{what}; what there is of it is ignored"
    if not stop:
        return f"{what} (begun {begun}); what there is of it is ignored"
    return (
        f"{what}: begun {begun} because of {stop}, it took longer than what was left (the grace "
        "time was too short); what there is of it is ignored. Let the signal come earlier, save "
        "more often (loop.save_every), or save less in a rank (more ranks, peft=lora)"
    )


def newest_step(run_dir: Path) -> int:
    """Return the step of the newest committed checkpoint by its name, 0 when there is none."""
    names = (path.name for path in (run_dir / CHECKPOINTS_NAME).glob("step_*"))
    return max((int(name[5:]) for name in names if name[5:].isdigit()), default=0)
