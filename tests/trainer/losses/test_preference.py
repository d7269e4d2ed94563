"""Preference losses by hand, against float64 formulas and TRL's functions, and their gradients."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from trainer.losses.preference import (
    LOSSES,
    AnswerLogps,
    PairLogps,
    chosen_nll,
    kl_baseline,
    kto,
    log1m_exp,
)

OPTIONS = Path(__file__).resolve().parents[3] / "conf/loss"
TRL_SCRIPT = Path(__file__).with_name("trl_preference.py")
GIVEN: dict[str, list[float]] = {
    "chosen": [-12.0, -30.5, -4.0],
    "rejected": [-15.0, -28.0, -4.5],
    "reference_chosen": [-13.0, -29.0, -6.0],
    "reference_rejected": [-14.0, -28.5, -3.5],
    "chosen_lengths": [6.0, 20.0, 3.0],
    "rejected_lengths": [10.0, 14.0, 9.0],
    "mismatched": [-40.0, -22.0],
    "reference_mismatched": [-41.5, -21.5],
}
SETTINGS: dict[str, dict[str, float]] = {
    "sigmoid": {"beta": 0.3},
    "cdpo": {"beta": 0.3, "label_smoothing": 0.1},
    "robust": {"beta": 0.3, "label_smoothing": 0.1},
    "hinge": {"beta": 0.3},
    "ipo": {"beta": 0.3},
    "simpo": {"beta": 2.0, "gamma": 0.5},
    "orpo": {"odds_weight": 0.2},
    "kto": {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.8},
}
# What trl_preference.py printed for GIVEN: TRL 0.24.0, torch 2.13, float64.
TRL: dict[str, list[float]] = {
    "sigmoid": [0.4374879504858857, 1.0374879504858856, 0.34115387473208786],
    "cdpo": [0.4974879504858857, 0.9774879504858855, 0.4311538747320878],
    "robust": [0.3624879504858856, 1.1124879504858856, 0.22865387473208784],
    "hinge": [0.4, 1.6, 0.10000000000000009],
    "ipo": [1.9600000000000004, 3.159083049886621, 0.7901234567901234],
    "simpo": [1.7014132779827524, 0.49324894599745484, 2.275125337674476],
    "orpo": [2.208411561585427, 1.614283453623561, 1.6671169102738281],
    "kto": [
        *[0.5550841855875005, 0.7747875674709545, 0.4672329192609335],
        *[0.3114886128406224, 0.4, 0.3114886128406224],
    ],
}
# The same by plain arithmetic on one pair: chosen -2 over 2 tokens, rejected -3 over 3 tokens,
# reference -2.5 and -2: Δ = 1 + 0.5 = 1.5.
HAND: dict[str, tuple[dict[str, float], float]] = {
    "sigmoid": ({"beta": 0.1}, math.log(1 + math.exp(-0.15))),
    "cdpo": (
        {"beta": 0.1, "label_smoothing": 0.2},
        0.8 * math.log(1 + math.exp(-0.15)) + 0.2 * math.log(1 + math.exp(0.15)),
    ),
    "robust": (
        {"beta": 0.1, "label_smoothing": 0.2},
        (0.8 * math.log(1 + math.exp(-0.15)) - 0.2 * math.log(1 + math.exp(0.15))) / 0.6,
    ),
    "hinge": ({"beta": 0.1}, 0.85),
    # (-1 + 1) - (-1.25 + 2/3) = 7/12; 1/(2·0.5) = 1
    "ipo": ({"beta": 0.5}, (7 / 12 - 1) ** 2),
    "simpo": ({"beta": 2.0, "gamma": 0.5}, math.log(1 + math.exp(0.5))),
    # Equal means give odds of 1: NLL 1 and 0.1·log 2.
    "orpo": ({"odds_weight": 0.1}, 1 + 0.1 * math.log(2)),
}
PAIRED = sorted(name for name, loss in LOSSES.items() if loss.is_paired)


def pairs(dtype: torch.dtype = torch.float64, **given: list[float]) -> PairLogps:
    given = {**GIVEN, **given}
    return PairLogps(*(torch.tensor(given[name], dtype=dtype) for name in PairLogps._fields))


def answers(baseline: float, dtype: torch.dtype = torch.float64) -> AnswerLogps:
    logps = pairs(dtype)
    return AnswerLogps(
        policy=torch.cat([logps.chosen, logps.rejected]),
        reference=torch.cat([logps.reference_chosen, logps.reference_rejected]),
        sides=torch.tensor([1, 1, 1, -1, -1, -1]),
        baseline=torch.tensor(baseline, dtype=dtype),
    )


def compute(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a loss of ``GIVEN``."""
    loss = LOSSES[name]
    logps: Any = pairs(dtype) if loss.is_paired else answers(0.5, dtype)  # (1.5 - 0.5) / 2
    return loss.function(logps, **settings_of(name))


def settings_of(name: str) -> dict[str, float]:
    """Return the hyperparameters compared with TRL's, or else those of the loss's option."""
    return SETTINGS.get(name) or read_option(name)


def read_option(name: str) -> dict[str, Any]:
    values = yaml.safe_load((OPTIONS / f"{name}.yaml").read_text(encoding="utf-8"))
    assert values.pop("name") == name
    return dict(values)


@pytest.mark.parametrize("name", HAND)
def test_a_pair_by_hand(name: str) -> None:
    settings, expected = HAND[name]
    given = {"chosen": [-2.0], "rejected": [-3.0], "reference_chosen": [-2.5]}
    given |= {"reference_rejected": [-2.0], "chosen_lengths": [2.0], "rejected_lengths": [3.0]}
    [value] = LOSSES[name].function(pairs(**given), **settings).tolist()
    assert value == pytest.approx(expected, abs=1e-12)


def test_kto_by_hand() -> None:
    logps = AnswerLogps(
        torch.tensor([-2.0, -3.0]), torch.tensor([-3.0, -2.0]), torch.tensor([1, -1]),
        torch.tensor(0.5),
    )  # fmt: skip
    values = kto(logps, beta=2.0, desirable_weight=1.0, undesirable_weight=0.5).tolist()
    # log-ratios 1 and -1 against 0.5: 2·(1 - 0.5) = 1 and -2·(-1 - 0.5) = 3
    assert values == pytest.approx([1 / (1 + math.e), 0.5 / (1 + math.exp(3))], abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_an_option_that_sets_its_hyperparameters(name: str) -> None:
    assert set(read_option(name)) == set(LOSSES[name].hyperparameters)
    assert compute(name).isfinite().all()


def test_every_option_is_a_loss() -> None:
    assert {path.stem for path in OPTIONS.glob("*.yaml")} == LOSSES.keys()


@pytest.mark.parametrize("name", TRL)
def test_equals_what_trl_gave(name: str) -> None:
    assert compute(name).tolist() == pytest.approx(TRL[name], abs=1e-12)
    single = compute(name, torch.float32)
    assert single.dtype == torch.float32
    assert single.tolist() == pytest.approx(TRL[name], abs=1e-6)


def test_equals_trl_where_it_is_installed() -> None:
    python = os.environ.get("KUROSHIO_PEERS_PYTHON")
    if python is None:
        pytest.skip("KUROSHIO_PEERS_PYTHON names no Python that has TRL")
    done = subprocess.run(
        [python, str(TRL_SCRIPT)], input=json.dumps(GIVEN), capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name, values in json.loads(done.stdout.splitlines()[-1]).items():
        assert compute(name).tolist() == pytest.approx(values, abs=1e-6), name


@pytest.mark.parametrize("name", PAIRED)
def test_gradients_raise_the_chosen_and_lower_the_rejected(name: str) -> None:
    given = {"chosen_lengths": [4.0] * 3, "rejected_lengths": [4.0] * 3}
    chosen = torch.tensor([-6.0, -5.0, -8.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-5.5, -5.2, -7.0], dtype=torch.float64, requires_grad=True)
    logps = pairs(**given)._replace(chosen=chosen, rejected=rejected)
    LOSSES[name].function(logps, **settings_of(name)).sum().backward()
    assert (chosen.grad < 0).all() and (rejected.grad > 0).all()


def test_kto_gradients_follow_the_sides_and_leave_the_baseline() -> None:
    logps = answers(0.2)
    policy = logps.policy.clone().requires_grad_()
    mismatched = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    baseline = kl_baseline(mismatched, torch.tensor(2))
    assert baseline.item() == 1.5 and not baseline.requires_grad
    kto(logps._replace(policy=policy, baseline=baseline), **SETTINGS["kto"]).sum().backward()
    assert ((policy.grad < 0) == (logps.sides > 0)).all() and (policy.grad != 0).all()


def test_the_baseline_is_never_negative_and_needs_no_answer() -> None:
    assert kl_baseline(torch.tensor(-4.0), torch.tensor(2)).item() == 0
    assert kl_baseline(torch.tensor(0.0), torch.tensor(0)).item() == 0


@pytest.mark.parametrize("name", [n for n in PAIRED if not LOSSES[n].uses_reference])
def test_losses_without_a_reference_do_not_look_at_one(name: str) -> None:
    other = pairs(reference_chosen=[9.0] * 3, reference_rejected=[-9.0] * 3)
    assert torch.equal(LOSSES[name].function(other, **settings_of(name)), compute(name))


@pytest.mark.parametrize("name", PAIRED)
def test_a_pair_does_not_hang_on_the_others(name: str) -> None:
    alone = PairLogps(*(field[1:2] for field in pairs()))
    assert torch.equal(LOSSES[name].function(alone, **settings_of(name))[0], compute(name)[1])


@pytest.mark.parametrize("name", ["sigmoid", "cdpo", "robust", "hinge", "simpo", "kto"])
def test_far_apart_log_probabilities_stay_finite(name: str) -> None:
    far = {"chosen": [-1.0] * 3, "rejected": [-1e4] * 3}
    function = LOSSES[name].function
    logps: Any = pairs(torch.float32, **far)
    if not LOSSES[name].is_paired:
        logps = answers(0.0, torch.float32)._replace(policy=torch.full((6,), -1e4))
    assert function(logps, **settings_of(name)).isfinite().all()


def test_certain_answers_have_finite_odds() -> None:
    given = {"chosen": [0.0, -1e-12, -3.0], "rejected": [0.0, -1e4, 0.0]}
    chosen = torch.tensor(given["chosen"], requires_grad=True)
    logps = pairs(torch.float32, **given)._replace(chosen=chosen)
    loss = LOSSES["orpo"].function(logps, odds_weight=0.1)
    loss.sum().backward()
    assert loss.isfinite().all() and chosen.grad is not None and chosen.grad.isfinite().all()


def test_log_of_one_minus_exp() -> None:
    logps = torch.tensor([-1e-5, -0.1, -0.6931, -0.7, -5.0, -80.0])
    expected = [math.log(-math.expm1(float(x))) for x in logps]
    assert log1m_exp(logps).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-30)


def test_nll_of_the_chosen() -> None:
    assert chosen_nll(pairs()).tolist() == pytest.approx([2.0, 1.525, 4 / 3])
