"""Taking a run folder for one life, and saying how the life ended."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.slurm_queue import ENDING, LIVING, job_state
from trainer.errors import KuroshioError, LeaseError, LostRankError, StopRequestedError
from trainer.heartbeat import describe_last
from trainer.lease import (
    LEASES_NAME,
    STALE_S,
    Holder,
    Lease,
    create_file,
    lease_path,
    newest_token,
    read_holder,
)
from trainer.lives import append_line, life_number, newest_step, slurm_life, utc_now
from trainer.metrics.redaction import redact_text

LOG = logging.getLogger(__name__)
ENDING_WAIT_S = 60.0  # Slurm kills what has not ended after its KillWait, 30 s unless configured
POLL_S = 2.0
HEARTBEAT = "its last heartbeat"
AskState = Callable[[str], str | None]


def take_lease(run_dir: Path, environ: Mapping[str, str], ask_state: AskState = job_state) -> Lease:
    """Take a run folder on rank 0, from a life that is being ended once it is gone.

    Raises:
        LeaseError: another life is in it, naming job and host.
    """
    life, first, waited_s = slurm_life(environ), None, 0.0
    while True:
        holder = read_holder(run_dir)
        sign = holder and life_sign(holder, life, _file_system_time(run_dir), ask_state)
        if holder and sign and (ENDING not in sign or waited_s < ENDING_WAIT_S):
            first = first or holder
            if not _may_be_over(sign, first, holder) or waited_s > STALE_S:
                raise LeaseError(_in_use(run_dir, holder, sign))
            if not waited_s:
                LOG.warning("waiting for life %d on %s: %s", holder.token, holder.host, sign)
            waited_s += POLL_S
            time.sleep(POLL_S)
            continue
        lease = Lease.take(run_dir, holder.token + 1 if holder else 1, life, utc_now())
        if lease is not None:
            return lease


def _may_be_over(sign: str, first: Holder, now: Holder) -> bool:
    """Return whether a life is being ended, or shows nothing but a heartbeat that has stopped.

    A job that resumes a killed one, and cannot ask Slurm from its image, must not fail for that.
    """
    return ENDING in sign or (HEARTBEAT in sign and now == first)


def life_sign(holder: Holder, life: Mapping[str, Any], now: float, ask_state: AskState) -> str:
    """Return what shows that the holder of a lease still lives, empty if nothing does.

    Args:
        holder: of the newest lease.
        life: job, restart and attempt of the life that asks.
        now: seconds since the epoch, by the clock that the heartbeat is of.
        ask_state: returns a Slurm job's state, see ``job_state``.
    """
    if holder.has_ended:
        return ""
    same_job = holder.job is not None and holder.job == life["job"]
    if same_job and life_number(vars(holder)) < life_number(life):
        return ""  # Slurm ended that life before it began this one, or gave its node up
    if holder.job is not None and not same_job:
        state = ask_state(holder.job)
        if state is not None:
            return f"its Slurm job is {state}" if state in (*LIVING, ENDING) else ""
    if holder.process.is_visible():
        pid = holder.process.pid
        return f"its process {pid} runs" if holder.process.is_alive() else ""
    age = now - holder.heartbeat
    return f"{HEARTBEAT} is {max(age, 0.0):.0f} s old" if age < STALE_S else ""


def _in_use(run_dir: Path, holder: Holder, sign: str) -> str:
    who = f"Slurm job {holder.job}" if holder.job else f"process {holder.process.pid}"
    cure = f"scancel {holder.job}" if holder.job else f"kill {holder.process.pid}"
    return (
        f"run_dir={run_dir} is in use: {who} on {holder.host} has lived there since "
        f"{holder.claimed} ({sign}). Wait for it, end it (`kuroshio stop {run_dir}` saves first; "
        f"`{cure}` on {holder.host}), or give another run_dir. A dead one is told by {STALE_S:.0f} "
        "s without a heartbeat"
    )


def _file_system_time(run_dir: Path) -> float:
    """Return the time by the clock that dates files, which need not be this machine's."""
    folder = run_dir / LEASES_NAME
    folder.mkdir(exist_ok=True)
    probe = folder / f".now.{socket.gethostname()}-{os.getpid()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def record_end(
    run_dir: Path,
    token: int | None,
    environ: Mapping[str, str],
    *,
    exit_code: int,
    reason: str,
    cause: str = "",
    rank: int | None = None,
) -> bool:
    """Record how a life ended, unless a rank of it was first: the others fail because of that one.

    Args:
        run_dir: the run's folder; nothing is written where there is none.
        token: of the life, None when it ended before it had one.
        environ: with Slurm's variables.
        exit_code: of the rank.
        reason: one line.
        cause: why it was asked to stop, empty when it was not.
        rank: who says so, None for a job script.

    Returns:
        Whether this was the first to say it.
    """
    life = slurm_life(environ)
    if not run_dir.is_dir() or (token is None and life["job"] is None):
        return False
    if token is not None and newest_token(run_dir) > token:
        return False  # the folder belongs to a newer life
    end = {"ended": utc_now(), "token": token, **life, "host": socket.gethostname()}
    end |= {"rank": rank, "exit_code": exit_code, "reason": redact_text(reason), "cause": cause}
    end["step"] = newest_step(run_dir)
    name = f"job_{life['job']}.{life['restart']}.{life['attempt']}.end"
    path = run_dir / LEASES_NAME / name
    if token is not None:
        path = lease_path(run_dir, token).with_suffix(".end")
    if not create_file(path, end):
        return False
    append_line(run_dir, {key: value for key, value in end.items() if key != "host"})
    return True


def read_failure(run_dir: Path, token: int, rank: int) -> str:
    """Return which rank of a life failed and why, empty if none but ``rank`` has said so."""
    try:
        end = json.loads(lease_path(run_dir, token).with_suffix(".end").read_text("utf-8"))
        failed, host, reason = end["rank"], end["host"], end["reason"]
    except (OSError, ValueError, KeyError, TypeError):  # nobody has, or is about to
        return ""
    return "" if failed in (None, rank) else f"rank {failed} on {host} failed: {reason}"


def record_silent_end(run_dir: Path, exit_code: int) -> None:
    """Record the end of a life on this machine whose rank 0 could not: it was killed."""
    holder = read_holder(run_dir)
    if holder is None or holder.has_ended or not holder.process.is_visible():
        return
    if not holder.process.is_alive():
        seen = describe_last(run_dir, holder.token)
        reason = f"the ranks were killed before one could say why (exit {exit_code}){seen}"
        record_end(run_dir, holder.token, os.environ, exit_code=exit_code, reason=reason)


@dataclass
class Stay:
    """A rank's stay in a run folder.

    Attributes:
        run_dir: the folder.
        rank: of this process.
        lease: once the life has one.
    """

    run_dir: Path
    rank: int
    lease: Lease | None = None

    def end(self, exit_code: int, reason: str, cause: str = "") -> None:
        """Record how the life ended, as far as it is this rank's to say."""
        token = self.lease.token if self.lease else None
        words = {"exit_code": exit_code, "reason": reason, "cause": cause}
        try:
            record_end(self.run_dir, token, os.environ, rank=self.rank, **words)  # type: ignore
        except OSError as error:  # the disk may be what ended the run
            LOG.warning("lives.jsonl of %s lacks this end: %s", self.run_dir, error)


@contextmanager
def recorded_stay(run_dir: Path, rank: int) -> Iterator[Stay]:
    """Record how the block ends: the job script cannot tell, since srun kills the other ranks."""
    stay = Stay(run_dir, rank)
    try:
        yield stay
    except BaseException as error:
        own = not isinstance(error, (LostRankError, StopRequestedError, SystemExit))
        names_rank = isinstance(error, LostRankError) and error.names_rank
        if own or names_rank or rank == 0:
            stay.end(*describe_error(error))
        raise
    if rank == 0:
        stay.end(0, "finished")


def describe_error(error: BaseException) -> tuple[int, str, str]:
    """Return exit code, reason and cause of what ended a rank."""
    if isinstance(error, StopRequestedError):
        return error.exit_code, str(error), error.cause
    if isinstance(error, KuroshioError):
        return error.exit_code, str(error), ""
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        return code, "stopped by a signal before the first step", ""
    return 1, f"{type(error).__name__}: {error}", ""
