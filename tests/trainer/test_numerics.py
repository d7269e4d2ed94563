"""The guard: what is a spike, what is answered, what resumes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from trainer.config import GuardConfig
from trainer.errors import NumericsError, RollBackError
from trainer.numerics import NumericsGuard, Update, is_spike, measure

HISTORY = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.2, 0.8]
NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "expected"),
    # median 1, median deviation 0.075, so a deviation is 0.1112
    [(1.0, False), (2.1, False), (2.12, True), (0.0, False), (1e9, True)],
)
def test_a_spike_is_far_above_the_median(value: float, expected: bool) -> None:
    assert is_spike(value, HISTORY, 10.0) is expected


def test_earlier_spikes_do_not_hide_a_spike() -> None:
    assert is_spike(5.0, [*HISTORY, 1e6, 1e6, 1e6], 10.0)


def test_a_flat_history_lets_a_little_pass() -> None:
    assert not is_spike(1.09, [1.0] * 8, 10.0)
    assert is_spike(1.11, [1.0] * 8, 10.0)
    assert is_spike(-0.8, [-1.0] * 8, 10.0)  # a loss may be below 0


def test_a_history_of_zeros_has_no_scale_to_leap_by() -> None:
    history = [0.0] * 5 + [0.4, 0.5, 0.6]  # most prompts of GRPO may teach nothing
    assert not is_spike(0.5, history, 10.0) and not is_spike(0.5, [0.0] * 8, 10.0)


def test_measured_facts_are_sums() -> None:
    losses = [torch.tensor(1.5), torch.tensor(NAN), torch.tensor(2.0)]
    ids = [torch.tensor([number]) for number in range(3)]
    [facts] = measure([Update(0, ids, losses, torch.tensor(float("inf")))])
    assert facts == (1.0, 3.5, 1.0, 0.0)
    assert measure([]) == []


class Engine:
    """Does a step unless the judge of its norm refuses."""

    def __init__(self, **config: Any) -> None:
        self.guard = NumericsGuard(GuardConfig(**config))
        self.done: list[int] = []

    def step(self, step: int, loss: float = 1.0, norm: float = 1.0, overflow: bool = False) -> None:
        self.guard.watch(step, torch.tensor([2 * step]), torch.tensor(loss / 2))
        self.guard.watch(step, torch.tensor([2 * step + 1]), torch.tensor(loss / 2))
        judge = self.guard.judge
        if not overflow and (judge is None or judge(torch.tensor(norm))):
            self.done.append(step)
        self.guard.end_step(torch.tensor(norm), overflow)


def test_stop_looks_when_asked_and_names_step_and_rows() -> None:
    engine = Engine()
    engine.step(0)
    engine.step(1, loss=NAN)
    engine.step(2)
    assert engine.guard.judge is None and engine.done == [0, 1, 2]
    with pytest.raises(NumericsError, match=r"loss is not finite at step 2, rows \[2, 3\] on rank"):
        engine.guard.check()


def test_what_the_scaler_skipped_is_forgiven() -> None:
    for non_finite in ("stop", "skip"):
        engine = Engine(non_finite=non_finite)
        engine.step(0, loss=float("inf"), norm=float("inf"), overflow=True)
        engine.guard.check()
        assert (engine.guard.num_overflows, engine.guard.num_skips) == (1, 0)


@pytest.mark.parametrize(("loss", "norm", "why"), [(NAN, 1.0, "loss"), (1.0, NAN, "gradient norm")])
def test_skip_refuses_the_step_before_it_is_made(loss: float, norm: float, why: str) -> None:
    engine = Engine(non_finite="skip")
    engine.step(0)
    engine.step(1, loss, norm)
    engine.step(2)
    engine.guard.check()
    assert engine.done == [0, 2] and engine.guard.num_skips == 1
    [event] = engine.guard.take_events()
    assert event["skipped"] == 2 and event["rows"] == [[2, 3]]
    assert event["why"].startswith(f"{why} is not finite at step 2")
    assert engine.guard.take_events() == [] and engine.guard.counts()["num_skips"] == 1


def test_skips_are_counted_within_their_window() -> None:
    engine = Engine(non_finite="skip", max_skips=2, skip_window=10, max_roll_backs=0)
    for step in (0, 3, 10, 13):
        engine.step(step, loss=NAN)
    assert engine.guard.num_skips == 4
    with pytest.raises(NumericsError, match=r"guard.max_skips=2 in guard.skip_window=10") as caught:
        engine.step(14, loss=NAN)
    assert type(caught.value) is NumericsError and engine.done == []


def test_used_up_skips_roll_back_where_that_is_allowed() -> None:
    engine = Engine(non_finite="skip", max_skips=1)
    engine.step(0, loss=NAN)
    with pytest.raises(RollBackError) as caught:
        engine.step(4, loss=NAN)
    assert caught.value.step == 4


@pytest.mark.parametrize("spikes", ["stop", "roll_back", "skip"])
@pytest.mark.parametrize("what", ["loss", "norm"])
def test_spikes_are_judged_once_the_history_is_long_enough(spikes: str, what: str) -> None:
    engine = Engine(spikes=spikes, spike_window=4)
    engine.step(0, **{what: 50.0})  # nothing to compare with
    for step in range(1, 5):
        engine.step(step, loss=1.0 + step / 100, norm=2.0)
    engine.step(5, **{what: 90.0})
    if spikes == "skip":
        assert engine.done == [0, 1, 2, 3, 4] and engine.guard.num_skips == 1
        engine.step(6, **{what: 90.0})  # the first one is not part of the history
        assert engine.guard.num_skips == 2
        return
    with pytest.raises(RollBackError if spikes == "roll_back" else NumericsError, match="leaps"):
        engine.guard.check()


def test_a_policy_for_spikes_leaves_what_is_not_finite_to_its_own() -> None:
    engine = Engine(spikes="skip")
    with pytest.raises(NumericsError, match="loss is not finite"):
        engine.step(0, loss=NAN)
    assert engine.done == []


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_resumed_guard_judges_alike(cut: int) -> None:
    def walk(engine: Engine, steps: range) -> None:
        for step in steps:
            engine.step(step, loss=40.0 if step % 7 == 6 else 1.0 + step * 0.01)
            engine.guard.check()

    config: dict[str, Any] = {"spikes": "skip", "spike_window": 4, "max_skips": 2}
    whole, first, second = Engine(**config), Engine(**config), Engine(**config)
    walk(whole, range(10))
    walk(first, range(cut))
    state = json.loads(json.dumps(first.guard.state()))
    second.guard.load(state, first.guard.num_overflows)
    walk(second, range(cut, 10))
    assert first.done + second.done == whole.done == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    assert second.guard.state() == whole.guard.state()


def test_state_of_a_checkpoint_without_a_guard_is_empty() -> None:
    guard = NumericsGuard(GuardConfig())
    guard.load({}, 3)
    assert guard.num_overflows == 3 and guard.state()["skipped"] == []


def test_a_veto_follows_the_policy() -> None:
    engine = Engine(non_finite="skip")
    engine.guard.veto(3, "rewards are not finite", [7, 8])
    [event] = engine.guard.take_events()
    assert event["rows"] == [[7, 8]] and event["skipped"] == 4
    with pytest.raises(RollBackError, match="rewards are not finite at step 4"):
        Engine(non_finite="roll_back").guard.veto(3, "rewards are not finite", [7])


def test_the_largest_norm_of_the_steps_looked_at_is_logged() -> None:
    engine = Engine()
    for step, norm in enumerate([1.0, 5.0, 2.0]):
        engine.step(step, norm=norm)
    engine.guard.check()
    assert engine.guard.counts() == {"largest_grad_norm": 5.0}
