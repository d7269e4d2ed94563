"""``python -m launch.job_end RUN --code CODE``: what a job script does once its ranks have ended.

Standard library only: it has to work where the ranks' libraries do not.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launch.slurm_queue import array_task, job_state, job_time_limit
from launch.tenancy import record_end
from trainer.errors import EXIT_RESUME, STOP_FILE_CAUSE, CorruptionError
from trainer.heartbeat import describe_last
from trainer.lease import read_holder
from trainer.lives import (
    STOP_NAME,
    append_line,
    cut_saves,
    life_number,
    newest_step,
    read_lives,
    slurm_life,
    utc_now,
)

REQUEUE_WAIT_S = 60  # for Slurm to end the script of a job that it has requeued
RETRY_AFTER_S = (5, 15, 40)  # a controller that restarts must not cost the run its next lives
# What no retry cures, and what to do instead.
FINAL = {
    65: "mend the data that the message names",
    66: "restore the checkpoint or the run folder",
    71: "start every rank from the same checkout, on a shared file system",
    73: "another life owns the run folder; let it finish",
    74: "free space, or choose a folder that you may write",
    76: "a retry would replay it: lower the learning rate or look at the data of that step",
    78: "mend the configuration",
}
RESTART_CODE = 101  # tells the script to start the ranks again in the job as it is
Action = Literal["done", "restart", "requeue", "give up", "leave"]


@dataclass(frozen=True)
class LifeEnd:
    """What is known when the ranks of a job have ended.

    Attributes:
        code: of srun.
        exit_code: what a rank recorded, None when no rank could.
        reason: the rank's, empty likewise.
        cause: why all ranks agreed to stop, empty if they did not.
        was_stopped: whether the user asked for the stop by a file.
        state: of the job in Slurm, None when it cannot be asked.
        num_lives: of this job, this one included.
        num_idle_lives: lives in a row, this one the last, that committed no checkpoint.
        step: of the newest checkpoint.
        has_started: whether the script came so far as to start the ranks.
        has_time: whether the job's time limit is far enough for another life before it.
        max_lives: of the job.
        max_idle_lives: in a row.
    """

    code: int
    exit_code: int | None
    reason: str
    cause: str
    was_stopped: bool
    state: str | None
    num_lives: int
    num_idle_lives: int
    step: int
    has_started: bool
    has_time: bool
    max_lives: int
    max_idle_lives: int


@dataclass(frozen=True)
class Decision:
    """What becomes of the job, with what exit code, and why."""

    action: Action
    exit_code: int
    reason: str


def decide(end: LifeEnd) -> Decision:
    """Return what becomes of a job whose ranks have ended."""
    if end.code == 0:
        return Decision("done", 0, f"the run is finished at step {end.step}")
    # A rank's own code: srun's may be that of the ranks it killed, or a signal's after the save.
    code = end.exit_code or end.code
    what = end.reason or describe_code(end.code)
    if end.was_stopped:
        return Decision("leave", code, f"{what}; `kuroshio resume` goes on")
    if code in FINAL:
        return Decision(
            "give up", code, f"{what} (exit {code}). No retry cures this: {FINAL[code]}"
        )
    if end.state is not None and end.state != "RUNNING":
        gone = end.state or "gone from the queue"
        return Decision("leave", code, f"{what}; the job is {gone}, so Slurm decides on it")
    if end.num_idle_lives >= end.max_idle_lives:
        return Decision(
            "give up",
            code,
            f"{what} (exit {code}). {end.num_idle_lives} lives in a row committed no checkpoint "
            f"after step {end.step} (cluster.max_lives_without_progress={end.max_idle_lives})",
        )
    if end.num_lives >= end.max_lives:
        return Decision(
            "give up",
            code,
            f"{what} (exit {code}). This was life {end.num_lives} of "
            f"cluster.max_lives={end.max_lives}; the newest checkpoint is of step {end.step}",
        )
    next_life = f"Life {end.num_lives + 1} of at most {end.max_lives} resumes at step {end.step}"
    if _may_stay(end, code) and end.num_idle_lives < 2:
        # The nodes are still ours: no wait in the queue. Not twice in vain: others may do better.
        return Decision("restart", RESTART_CODE, f"{what} (exit {code}). {next_life}, in this job")
    return Decision("requeue", EXIT_RESUME, f"{what} (exit {code}). {next_life}")


def _may_stay(end: LifeEnd, said: int) -> bool:
    """Return whether the same nodes may go on: nobody wants them back, and they are fit.

    Args:
        end: of the life.
        said: the exit code that counts. Ranks that srun ends for a killed one may say 75, too;
            a signal that asked all of them to leave ends them alike.
    """
    asked = end.code in (EXIT_RESUME, 128 + signal.SIGTERM)
    was_asked = said == EXIT_RESUME and (asked or bool(end.cause))
    is_ours = end.state == "RUNNING" and end.has_started and end.has_time
    return is_ours and not was_asked and said != CorruptionError.exit_code


def describe_code(code: int, said: str = "") -> str:
    """Return what srun's exit code says where no rank left a word, but perhaps a node."""
    words = [line[10:] for line in said.splitlines() if line.startswith("kuroshio: ")]
    if words:
        return "; ".join(words)
    if code > 128:
        return f"the ranks were killed by signal {code - 128} before one could say why"
    return f"srun exited {code} and no rank said why: see the job's log"


def first_steps(lives: Sequence[Mapping[str, Any]], this: Mapping[str, Any]) -> list[int | None]:
    """Return where each life of a job started, in their order; None where it never began.

    Args:
        lives: of the job, as far as they left a word.
        this: the life that ended now, the last one.
    """
    restart, attempt = life_number(this)
    found: dict[tuple[int, int], int | None] = {(number, 0): None for number in range(restart)}
    found |= {(restart, number): None for number in range(attempt + 1)}
    found |= {life_number(life): life.get("first_step") for life in lives}
    return [found[number] for number in sorted(found)]


def count_idle_lives(first_steps: Sequence[int | None], step: int) -> int:
    """Return how many lives of a job, counted back from the last, committed no checkpoint.

    Args:
        first_steps: of its lives; one that never began has made no step either.
        step: of the newest checkpoint.
    """
    starts = enumerate(reversed(first_steps))
    return next((num for num, start in starts if start not in (None, step)), len(first_steps))


def main(arguments: Sequence[str]) -> int:
    """Decide, say why, requeue the job if that is what it needs; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.job_end", allow_abbrev=False)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--code", type=int, required=True)
    # What nodes printed that were looked at before the ranks.
    parser.add_argument("--said", default="")
    parser.add_argument("--max-lives", type=int, required=True)
    parser.add_argument("--max-lives-without-progress", type=int, required=True)
    # Before the time limit, when the ranks are told to save. A script that can start the ranks
    # again gives it; older ones cannot.
    parser.add_argument("--signal-s", type=float)
    # The script gave up before them: a node is unfit, or a signal came.
    parser.add_argument("--not-started", action="store_true")
    # In a container there is no squeue: the script asks it. Empty: it did not answer.
    parser.add_argument("--state")
    # Nor is there scontrol: the script calls it when it sees this code.
    parser.add_argument("--requeue-code", type=int)
    options = parser.parse_args(arguments)
    run_dir, this = options.run_dir, slurm_life(os.environ)
    if this["job"] is None:
        parser.error("SLURM_JOB_ID is not set: this is for the script of a Slurm job")
    if newer := _newer_life(run_dir, this):
        print(f"kuroshio: {run_dir} belongs to {newer} by now; this life leaves it alone")
        return 73
    decision = decide(_gather(run_dir, options, this))
    with _despite_storage(run_dir):
        append_line(
            run_dir,
            {"decided": utc_now(), **this, "decision": decision.action}
            | {"decision_reason": decision.reason},
        )
    print(f"kuroshio: {decision.action}: {decision.reason}", flush=True)
    if decision.action == "restart":
        return decision.exit_code  # the script does it
    if decision.action != "requeue":
        # Its own codes are no ranks': a program in Rust exits with 101.
        is_own = decision.exit_code in (RESTART_CODE, options.requeue_code)
        return 1 if is_own else decision.exit_code
    return options.requeue_code or _requeue(str(array_task(os.environ)))


@contextmanager
def _despite_storage(run_dir: Path) -> Iterator[None]:
    """Decide also where nothing can be written: a full disk may be what ended the ranks."""
    try:
        yield
    except OSError as error:
        print(f"kuroshio: lives.jsonl of {run_dir} lacks this end: {error}", flush=True)


def _newer_life(run_dir: Path, this: Mapping[str, Any]) -> str:
    """Return who lives in the folder after this life, from whose node Slurm took the job."""
    holder = read_holder(run_dir) if run_dir.is_dir() else None
    if holder is None or holder.job != this["job"]:
        return ""
    if life_number(vars(holder)) <= life_number(this):
        return ""
    place = f"restart {holder.restart}, attempt {holder.attempt} of the job, on {holder.host}"
    return f"life {holder.token} ({place})"


def _gather(run_dir: Path, options: argparse.Namespace, this: Mapping[str, Any]) -> LifeEnd:
    """Read what the ranks left; write their end for them if they could not."""
    lives = _lives_of(run_dir, this["job"])
    own = [life for life in lives if life_number(life) == life_number(this)]
    if not own or "ended" not in own[-1]:
        token = own[-1].get("token") if own else None
        reason = "finished"
        if options.code:
            reason = describe_code(options.code, options.said) + describe_last(run_dir, token)
        reason = "; ".join([reason, *cut_saves(run_dir, token)])
        with _despite_storage(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            record_end(run_dir, token, os.environ, exit_code=options.code, reason=reason)
        lives = _lives_of(run_dir, this["job"])
        own = [life for life in lives if life_number(life) == life_number(this)]
    # A rank that failed before its life had a token, and rank 0, which srun ended for it, leave a
    # line each.
    final = [life for life in own if life.get("exit_code") in FINAL]
    told = [life for life in own if life.get("exit_code") not in (None, EXIT_RESUME)]
    last, step = (final or told or own or [{}])[-1], newest_step(run_dir)
    starts, cause = first_steps(lives, this), str(last.get("cause") or "")
    return LifeEnd(
        code=options.code,
        exit_code=last.get("exit_code"),
        reason=str(last.get("reason", "")),
        cause=cause,
        was_stopped=cause == STOP_FILE_CAUSE or ((run_dir / STOP_NAME).exists() and not final),
        state=job_state(this["job"]) if options.state is None else options.state or None,
        num_lives=len(starts),
        num_idle_lives=count_idle_lives(starts, step),
        step=step,
        has_started=not options.not_started,
        has_time=_has_time(options.signal_s),
        max_lives=options.max_lives,
        max_idle_lives=options.max_lives_without_progress,
    )


def _has_time(signal_s: float | None) -> bool:
    """Return whether a life that starts now has more than a signal's time until its signal."""
    if signal_s is None:
        return False
    limit = job_time_limit(os.environ)
    return limit is None or limit - time.time() > 2 * signal_s


def _lives_of(run_dir: Path, job: str) -> list[dict[str, Any]]:
    return [life for life in read_lives(run_dir) if life.get("job") == job]


def _requeue(job: str) -> int:
    """Put the job back into the queue; Slurm then ends its script, which is this one's parent."""
    for wait_s in (*RETRY_AFTER_S, None):
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        if done.returncode == 0:
            time.sleep(REQUEUE_WAIT_S)
            return EXIT_RESUME
        print(f"kuroshio: `scontrol requeue {job}` failed: {done.stderr.strip()}", flush=True)
        if wait_s is not None:
            time.sleep(wait_s)
    print("kuroshio: submit the job again to resume", flush=True)
    return EXIT_RESUME


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
