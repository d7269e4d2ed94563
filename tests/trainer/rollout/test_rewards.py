"""The section of rewards: what it builds, what it refuses, what it says when a rule fails."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.errors import ConfigError, DataError
from trainer.rollout.rewards import (
    ModelReward,
    RuleReward,
    build_rewards,
    reward_inputs,
    reward_problems,
)
from trainer.rollout.rules import RULES

OWN_RULE = '''
def ends_politely(prompt, response, answer, *, word: str = "謝謝", points: float = 1.0):
    """Pay for a polite end."""
    return points * response.endswith(word)

def asks_back(prompt, response, answer):
    return {"?": 1.0, "!": float("nan")}[response[-1]]
'''


@pytest.fixture
def own(tmp_path: Path) -> str:
    """Return the path of a file with rules."""
    (tmp_path / "own.py").write_text(OWN_RULE, encoding="utf-8")
    return str(tmp_path / "own.py")


@pytest.fixture
def model_folder(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    return str(tmp_path / "model")


def test_rewards_are_built_in_order_with_their_options(own: str, model_folder: str) -> None:
    rewards = build_rewards(
        {
            "judge": {"kind": "model", "path": model_folder, "weight": 2, "normalize": True},
            "length": {"low": 2, "high": 4, "weight": 0.5},
            "polite": {"kind": "python", "path": f"{own}:ends_politely", "points": 3},
        }
    )
    judge, short, polite = rewards
    assert judge == ModelReward("judge", model_folder, 2.0, False, True)
    assert judge.part == "reward:judge"
    assert isinstance(short, RuleReward) and isinstance(polite, RuleReward)
    assert (short.kind, short.weight, short.options) == ("length", 0.5, {"low": 2, "high": 4})
    scores = short.score(["?"] * 3, ["a", "abc", "a" * 8], [None] * 3)
    assert scores.dtype == torch.float64 and scores.tolist() == [0.5, 1.0, 0.5]
    assert polite.options == {"word": "謝謝", "points": 3.0}
    assert polite.score(["?", "?"], ["好，謝謝", "好"], [None, None]).tolist() == [3.0, 0.0]
    sha256 = hashlib.sha256(Path(own).read_bytes()).hexdigest()
    assert reward_inputs(rewards) == {"stage.rewards.polite.path": sha256}


def test_every_kind_of_rule_is_built_from_plain_values() -> None:
    options: dict[str, dict[str, Any]] = {
        "length": {"high": 5},
        "regex": {"pattern": "a+"},
        "contains": {"texts": ["a"]},
        "exact": {},
        "language": {},
    }
    assert options.keys() == RULES.keys()
    for reward in build_rewards(options):
        assert isinstance(reward, RuleReward)
        assert reward.score(["?"], ["aaa"], ["AAA"]).item() in (0.0, 1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"kind": "lenght", "high": 3},
            "kind='lenght': expected model|length.*did you mean length",
        ),
        ({"high": 3}, "kind=None: expected model|length"),
        (3, "=3: expected options"),
        ({"kind": "length"}, "high is missing"),
        ({"kind": "length", "high": 3, "lo": 1}, "lo is not a known key; did you mean low"),
        ({"kind": "length", "high": "long"}, "high='long': expected int, got str"),
        ({"kind": "length", "low": 5, "high": 3}, "low=5, high=3: expected 0 <= low <= high"),
        ({"kind": "length", "high": 3, "weight": "x"}, "weight='x': expected a number"),
        ({"kind": "regex", "pattern": "("}, "unterminated subpattern"),
        ({"kind": "exact", "pattern": "no group"}, "expected a group"),
        ({"kind": "contains", "texts": []}, "at least one character"),
        ({"kind": "model"}, "path is missing"),
        ({"kind": "model", "path": "nowhere"}, "nowhere is no folder of a reward model"),
        ({"kind": "model", "path": ".", "weigth": 1.0}, "weigth is not a known key"),
        ({"kind": "python"}, "path=None: expected FILE.py:FUNCTION"),
        ({"kind": "python", "path": "missing.py:rule"}, "there is no file missing.py"),
    ],
)
def test_bad_sections_are_named(values: Any, message: str) -> None:
    (problem,) = reward_problems({"good": {"kind": "language"}, "mine": values})
    assert problem.startswith("stage.rewards.mine")
    with pytest.raises(ConfigError, match=message):
        build_rewards({"mine": values})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", "has no function rule"),
        ("def ruler(prompt, response, answer): return 1", "no function rule; did you mean ruler"),
        ("def rule(prompt, response): return 1", "found the arguments prompt, response"),
        ("import nothing_of_that_name", "raised ModuleNotFoundError"),
        ("def rule(prompt, response, answer, *, high: int): return 1", "high is missing"),
    ],
)
def test_bad_files_of_rules_are_named(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "own.py").write_text(source)
    section = {"mine": {"kind": "python", "path": f"{tmp_path / 'own.py'}:rule"}}
    with pytest.raises(ConfigError, match=message):
        build_rewards(section)


@pytest.mark.parametrize(
    ("response", "what"), [("why.", "raised KeyError: '.'"), ("go!", "returned nan")]
)
def test_a_rule_that_fails_is_named_with_its_sample(own: str, response: str, what: str) -> None:
    (reward,) = build_rewards({"asks": {"kind": "python", "path": f"{own}:asks_back"}})
    assert isinstance(reward, RuleReward)
    prompt = "x" * 500 + "the end"
    with pytest.raises(DataError) as caught:
        reward.score(["p", prompt], ["is it?", response], [None, None])
    message = str(caught.value)
    assert message.startswith(f"stage.rewards.asks (kind python) {what}")
    assert repr(response) in message and "the end" in message and len(message) < 400


def test_exact_without_an_answer_says_so() -> None:
    (reward,) = build_rewards({"exact": {}})
    assert isinstance(reward, RuleReward)
    with pytest.raises(DataError, match=r"exact.*the data gives no answer to this prompt.*'why\?'"):
        reward.score(["why?"], ["so"], [None])
