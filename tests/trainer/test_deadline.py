"""What may still be begun before the job's time limit, by what it took before."""

from __future__ import annotations

import pytest

from trainer import deadline
from trainer.deadline import LEAVE_S, MARGIN, Deadline


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def spend(subject: Deadline, clock: Clock, work: deadline.Work, seconds: float) -> None:
    with subject.timed(work):
        clock.now += seconds


def begins_until(subject: Deadline, clock: Clock, work: deadline.Work, limit: float) -> float:
    """Return the last second at which ``work`` is begun."""
    clock.now = 1000.0
    while not subject.shortage(work) and clock.now < limit + 1:
        clock.now += 1
    return clock.now - 1


def test_without_a_limit_there_is_always_time(clock: Clock) -> None:
    subject = Deadline(None, clock)
    spend(subject, clock, "step", 1e6)
    assert subject.shortage("step") == "" and subject.measured() == {"step": 1e6}


def test_work_is_begun_while_it_ends_with_a_save_before_the_limit(clock: Clock) -> None:
    limit = 2000.0
    subject = Deadline(limit, clock)
    spend(subject, clock, "step", 20)
    spend(subject, clock, "step", 8)
    spend(subject, clock, "save", 40)
    spend(subject, clock, "evaluation", 100)
    assert begins_until(subject, clock, "step", limit) == limit - MARGIN * 60 - LEAVE_S
    assert begins_until(subject, clock, "evaluation", limit) == limit - MARGIN * 140 - LEAVE_S
    assert begins_until(subject, clock, "save", limit) == limit - MARGIN * 40 - LEAVE_S
    clock.now = 1950
    assert subject.shortage("step") == (
        "the time limit (50 s left are too few for: step 20.0 s and save 40.0 s)"
    )
    clock.now = 2100
    assert "(0 s left" in subject.shortage()


def test_a_slow_first_step_is_forgotten(clock: Clock) -> None:
    subject = Deadline(5000.0, clock)
    spend(subject, clock, "step", 500)
    assert subject.seconds("step") == 500
    for _ in range(deadline.WINDOW):
        spend(subject, clock, "step", 2)
    assert subject.seconds("step") == 2


def test_an_earlier_lifes_figures_count_until_there_are_own(clock: Clock) -> None:
    subject = Deadline(2000.0, clock)
    subject.expect({"step": 30.0, "save": 50.0})
    assert subject.seconds("step") == 30 and subject.seconds("save") == 50
    spend(subject, clock, "step", 3)
    assert subject.measured() == {"step": 3, "save": 50.0}


@pytest.mark.parametrize(("left", "guess"), [(300.0, 30.0), (86400.0, 120.0), (-5.0, 0.0)])
def test_the_first_save_is_guessed_and_the_guess_not_handed_on(
    clock: Clock, left: float, guess: float
) -> None:
    subject = Deadline(clock.now + left, clock)
    assert subject.seconds("save") == guess and subject.measured() == {}


def test_work_that_raised_is_not_measured(clock: Clock) -> None:
    subject = Deadline(2000.0, clock)
    with pytest.raises(KeyError), subject.timed("step"):
        raise KeyError
    assert subject.measured() == {}


def test_a_save_under_way_is_waited_for_before_the_last_one(clock: Clock) -> None:
    limit = 2000.0
    subject = Deadline(limit, clock)
    spend(subject, clock, "step", 20)
    subject.begin_save()
    subject.end_save(40.0)
    assert subject.measured() == {"step": 20.0, "save": 40.0}
    clock.now = 1700
    subject.begin_save()
    clock.now += 10  # 30 s of it are left, then 20 of a step, then 40 of the last save
    needed = MARGIN * 90 + LEAVE_S
    subject.time_limit = clock.now + needed
    assert subject.shortage("step") == ""
    subject.time_limit -= 1
    assert "step 20.0 s and save 40.0 s and save under way 30.0 s" in subject.shortage("step")
    clock.now += 90  # it takes longer than any before: so may the last one
    subject.time_limit = clock.now + 200
    assert subject.shortage("save") == ""
    assert subject.seconds("save") == 40.0
    subject.time_limit = clock.now + MARGIN * 100
    assert "save 100.0 s" in subject.shortage("save")
    subject.end_save(110.0)
    assert subject.seconds("save") == 110.0
