"""The update: minibatches, and the policy before it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.config import GuardConfig
from trainer.engine.judged import Judge
from trainer.errors import NumericsError
from trainer.losses.cross_entropy import IGNORE_INDEX
from trainer.metrics.bag import MetricBag
from trainer.numerics import NumericsGuard
from trainer.rollout.answer_rows import Layout, Sample
from trainer.rollout.experience import Experience, Figures
from trainer.rollout.update import ACTOR, Update, UpdateConfig

SAMPLES = [Sample([1, 2], [3] * length) for length in (2, 4, 1, 3, 5)]
LENGTHS = torch.tensor([len(sample.response) for sample in SAMPLES])
NUM = int(LENGTHS.sum())
LAYOUT = Layout(16, 1, False, 0)


@dataclass
class OneNumber:
    """An engine whose policy and critic are one number each, the same for every token."""

    logp: Tensor = field(default_factory=lambda: torch.tensor(-1.0, requires_grad=True))
    value: Tensor = field(default_factory=lambda: torch.tensor(0.5, requires_grad=True))
    windows: list[int] = field(default_factory=lambda: [0])
    held: list[str | None] = field(default_factory=list)
    precision: str = "fp32"
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __call__(self, part: str, labels: Tensor, **inputs: Any) -> Any:
        ones = torch.ones(int((labels[:, 1:] != IGNORE_INDEX).sum()))
        return (ones * self.logp, ones * self.value) if part == "both" else ones * self.logp

    def backward(self, loss: Tensor, is_last: bool) -> None:
        loss.backward()
        self.windows[-1] += 1
        if is_last:
            self.windows.append(0)

    def step(self, lr: float, held: str | None, judge: Judge | None) -> None:
        if judge is None or judge(self.grad_norm()):
            self.held.append(held)

    def grad_norm(self) -> Tensor:
        return torch.zeros(())

    def overflowed(self) -> bool:
        return False


def make_update(
    engine: Any,
    old: float,
    *,
    with_critic: bool = True,
    layout: Layout = LAYOUT,
    bag: MetricBag | None = None,
    guard: NumericsGuard | None = None,
    **config: Any,
) -> Update:
    """Return an update on five responses that were scored with log-probability ``old``."""
    values = torch.full((NUM,), 0.5) if with_critic else None
    flat = torch.full((NUM,), old)
    figures = Figures(LENGTHS, flat, flat - 1.0, values, torch.zeros(NUM))
    returns = torch.full((NUM,), 2.0) if with_critic else None
    experience = Experience(SAMPLES, figures, torch.ones(NUM), returns)
    return Update(
        engine,
        experience,
        UpdateConfig(**config),
        layout,
        temperature=1.0,
        loss_kl_coef=0.0 if with_critic else 0.25,
        bag=bag or MetricBag(),
        guard=guard or NumericsGuard(GuardConfig()),
    )


def test_every_sample_is_seen_once_an_epoch_in_whole_windows() -> None:
    engine = OneNumber()
    update = make_update(engine, -1.0, epochs=3, num_minibatches=2)
    epochs = [list(update._minibatches("0/7"))[at : at + 2] for at in (0, 2, 4)]
    for epoch in epochs:
        assert sorted(number for minibatch in epoch for number in minibatch) == [0, 1, 2, 3, 4]
    assert epochs[0] != epochs[1]
    update.run(0, 1e-3, "0/7", with_actor=True)
    assert engine.windows == [3, 2, 3, 2, 3, 2, 0]
    assert set(engine.held) == {None}


def test_losses_are_divided_by_the_tokens_of_the_minibatch() -> None:
    engine = OneNumber()
    update = make_update(engine, -1.0, epochs=1, num_minibatches=1, value_coef=0.5)
    update.run(0, 1e-3, "0", with_actor=True)
    assert engine.logp.grad is not None and engine.value.grad is not None
    assert float(engine.logp.grad) == pytest.approx(-1.0)  # minus the mean advantage
    assert float(engine.value.grad) == pytest.approx(0.5 * (0.5 - 2.0))


def test_divergence_in_the_loss_is_k3() -> None:
    engine = OneNumber()
    make_update(engine, -1.0, with_critic=False, epochs=1, num_minibatches=1).run(
        0, 1e-3, "0", with_actor=True
    )
    assert engine.logp.grad is not None
    # d/dlogp of exp(ref - logp) - (ref - logp) - 1 with ref = logp - 1
    slope = 1 - torch.tensor(-1.0).exp()
    assert float(engine.logp.grad) == pytest.approx(-1.0 + 0.25 * float(slope))


def test_warm_up_holds_the_policy() -> None:
    engine = OneNumber()
    make_update(engine, -1.0, epochs=1, num_minibatches=1).run(0, 1e-3, "0", with_actor=False)
    assert set(engine.held) == {ACTOR}
    assert engine.logp.grad is not None and engine.value.grad is not None
    assert float(engine.logp.grad) == 0.0 != float(engine.value.grad)


@pytest.mark.parametrize("old", [-1.01, float("nan")])
def test_another_policy_before_the_first_update_is_refused(old: float) -> None:
    update = make_update(OneNumber(), old)
    with pytest.raises(NumericsError, match=r"largest \|log ratio\| (0.01|nan) on rank 0"):
        update.run(0, 1e-3, "0", with_actor=True)


class CountsRows(NumericsGuard):
    """Expects numbers of samples, also where there are none."""

    def watch(self, step: int, sample_ids: torch.Tensor, loss: torch.Tensor) -> None:
        assert sample_ids.dtype == torch.int64
        super().watch(step, sample_ids, loss)


@pytest.mark.parametrize("with_critic", [True, False])
def test_a_rank_without_rows_records_what_others_do(with_critic: bool) -> None:
    """Five short samples fit into one row: two ranks of three have nothing to learn from."""
    names = []
    for rank in range(3):
        bag, layout = MetricBag(), Layout(64, 1, True, 0, rank, 3)
        guard = CountsRows(GuardConfig())
        config = {"epochs": 1, "num_minibatches": 1, "with_critic": with_critic, "guard": guard}
        make_update(OneNumber(), -1.0, layout=layout, bag=bag, **config).run(
            0, 1e-3, "0", with_actor=True
        )
        names.append(set(bag.drain(lambda sums: sums)))
    assert names[0] == names[1] == names[2]
    assert "policy_loss" in names[0]


def test_a_policy_that_broke_writes_no_more() -> None:
    update = make_update(OneNumber(), -1.0, epochs=1, num_minibatches=1)
    update.experience.advantages[0] = float("nan")
    with pytest.raises(NumericsError, match="loss is not finite at step 1"):
        update.run(0, 1e-3, "0", with_actor=True)


def test_a_minibatch_without_a_finite_loss_is_skipped_alone() -> None:
    engine, guard = OneNumber(), NumericsGuard(GuardConfig(non_finite="skip"))
    update = make_update(engine, -1.0, guard=guard, epochs=1, num_minibatches=5)
    update.experience.advantages[0] = float("nan")
    update.run(3, 1e-3, "0", with_actor=True)
    assert len(engine.held) == 4 and guard.num_skips == 1
    [event] = guard.take_events()
    assert event["skipped"] == 4 and event["rows"] == [[0]]
