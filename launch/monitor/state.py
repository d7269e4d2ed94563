"""What state a run is in: one word, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launch.monitor.queue import Job
from trainer.errors import EXIT_RESUME
from trainer.lease import STALE_S
from trainer.metrics.console import show_duration
from trainer.metrics.run_facts import RunFacts

# Words from best to worst news; the table colours them.
WORDS = ("finished", "running", "stopping", "pending", "requeued", "submitted", "new", "stopped",
         "held", "lost", "failed")  # fmt: skip
RESTART_SHOWS_S = 600.0  # after a script said that it starts the ranks again
SLOW_STEPS = 3.0  # without a lease a run is alive if this many steps ago it recorded one


@dataclass(frozen=True)
class State:
    """A word of ``WORDS`` and what more there is to say."""

    word: str
    note: str = ""

    @property
    def is_alive(self) -> bool:
        """Return whether ranks run now."""
        return self.word in ("running", "stopping")


def newest_job(facts: RunFacts, jobs: Mapping[str, Job] | None) -> Job | None:
    """Return the newest of the run's jobs that Slurm knows, one that is not over first."""
    known = [jobs[number] for number in facts.job_ids if number in jobs] if jobs else []
    going = [job for job in known if job.is_pending or job.is_active]
    known = going or known
    return known[-1] if known else None


def judge(facts: RunFacts, jobs: Mapping[str, Job] | None) -> State:
    """Return the state of a run.

    Args:
        facts: what its files say.
        jobs: what Slurm says; None when it was not asked, and then the files decide alone.
    """
    job = newest_job(facts, jobs)
    if job and job.is_active:
        return State(
            "stopping" if facts.stop_requested else "running",
            "" if job.state == "RUNNING" else job.state.lower(),
        )
    if job and job.is_pending:
        return _judge_pending(facts, job)
    if facts.is_finished:
        return State("finished")
    if is_alive(facts):
        return State("stopping" if facts.stop_requested else "running")
    return _judge_ended(facts, job, was_asked=jobs is not None)


def is_alive(facts: RunFacts) -> bool:
    """Return whether a process of the run shows signs of life."""
    if facts.holder is not None:
        holder = facts.holder
        if holder.has_ended:
            return False
        if holder.process.is_visible():
            return holder.process.is_alive()
        return facts.seconds_since(holder.heartbeat) < STALE_S
    if not facts.lives or facts.lives[-1].has_ended or facts.last_sign is None:
        return False
    step_s = facts.train.get("seconds") or 0.0
    return facts.seconds_since(facts.last_sign) < max(STALE_S, SLOW_STEPS * float(step_s))


def _judge_pending(facts: RunFacts, job: Job) -> State:
    if job.is_held:
        return State("held", job.reason)
    reason = "" if job.reason in ("None", "") else job.reason
    if not facts.lives:
        return State("pending", reason)
    return State("requeued", facts.lives[-1].why or reason)


def _judge_ended(facts: RunFacts, job: Job | None, was_asked: bool) -> State:
    """Judge a run of which nothing runs or waits."""
    last = facts.lives[-1] if facts.lives else None
    names = (job.number, job.own_number) if job else ()
    if job is not None and all(life.job not in names for life in facts.lives):
        word = "stopped" if job.state == "CANCELLED" else "failed"
        return State(word, f"job {job.number} {job.state} before it began to run")
    if last is None and facts.job_ids:
        number = facts.job_ids[-1]
        note = f"Slurm knows job {number} no more, and it left no life" if was_asked else ""
        return State("failed" if was_asked else "submitted", note)
    if last is None:
        return State("new")
    if not last.has_ended:
        sign = facts.last_sign or last.started
        age = f"no sign of life for {show_duration(facts.seconds_since(sign))}" if sign else ""
        return State("lost", ", ".join(part for part in (age, job.state if job else "") if part))
    if last.decision == "restart":
        is_fresh = facts.seconds_since(last.ended or 0.0) < RESTART_SHOWS_S and not was_asked
        return State("running" if is_fresh else "lost", last.why)
    if last.decision == "requeue" and not was_asked:
        return State("requeued", last.why)
    if last.exit_code == EXIT_RESUME and last.decision in ("", "leave"):
        return State("stopped", last.why)
    return State("failed", last.why)
