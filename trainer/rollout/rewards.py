"""Rewards: the ``stage.rewards`` section, checked, and its rules applied to answers."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import inspect
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.config.build import build, nearest
from trainer.errors import ConfigError, DataError
from trainer.rollout.rules import RULES, Rule

KINDS = ("model", *RULES, "python")
EXCERPT_CHARS = 80
RULE_ARGUMENTS = ("prompt", "response", "answer")


@dataclass(frozen=True)
class ModelReward:
    """A reward model's score.

    Attributes:
        name: of the reward.
        weight: factor in the sum of all rewards.
        path: folder of a sequence classifier with one label.
        through_text: render prompt and response anew, with the model's own tokenizer and template.
        normalize: take off the mean and divide by the deviation that the folder's config.json
            gives.
    """

    name: str
    path: str
    weight: float = 1.0
    through_text: bool = False
    normalize: bool = False

    @property
    def part(self) -> str:
        """Return the name of the part of the engine's module that computes it."""
        return f"reward:{self.name}"


@dataclass(frozen=True)
class RuleReward:
    """A rule's judgement.

    Attributes:
        name: of the reward.
        kind: of rule.
        rule: a function as in ``rules.py``.
        options: its keyword arguments.
        weight: factor in the sum of all rewards.
        source: SHA-256 of the file of a user's function, else the empty string.
    """

    name: str
    kind: str
    rule: Rule
    options: Mapping[str, Any]
    weight: float = 1.0
    source: str = ""

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str | None]
    ) -> Tensor:
        """Return the rule's number for each sample: ``[samples]`` float64, not weighted.

        Args:
            prompts: texts as the policy read them.
            responses: texts without the token that ended them.
            answers: the data's answers, None where it gives none.

        Raises:
            DataError: the rule raised, or returned anything but a finite number; rule and sample
                are named.
        """
        samples = zip(prompts, responses, answers, strict=True)
        return torch.tensor([self._judge(*sample) for sample in samples], dtype=torch.float64)

    def _judge(self, prompt: str, response: str, answer: str | None) -> float:
        try:
            value = float(self.rule(prompt, response, answer, **self.options))
        except Exception as error:
            what = f"raised {type(error).__name__}: {error}"
            raise DataError(self._describe(what, prompt, response)) from error
        if not math.isfinite(value):
            raise DataError(self._describe(f"returned {value}", prompt, response))
        return value

    def _describe(self, what: str, prompt: str, response: str) -> str:
        return (
            f"stage.rewards.{self.name} (kind {self.kind}) {what}, for {describe(prompt, response)}"
            "; every sample needs a finite number: mend the rule or its options"
        )


Reward = ModelReward | RuleReward


def describe(prompt: str, response: str) -> str:
    """Return a sample in a few words, for messages: a prompt's end, a response's beginning."""
    short = prompt if len(prompt) <= EXCERPT_CHARS else f"…{prompt[-EXCERPT_CHARS:]}"
    begun = response if len(response) <= EXCERPT_CHARS else f"{response[:EXCERPT_CHARS]}…"
    return f"the prompt {short!r} with the response {begun!r}"


def build_rewards(section: Mapping[str, Any]) -> list[Reward]:
    """Return the rewards of ``stage.rewards``, in its order.

    Args:
        section: ``{NAME: {kind: …, weight: …, further options of the kind}}``; the kind may be left
            out where the name is one.

    Raises:
        ConfigError: with every problem found.
    """
    problems: list[str] = []
    rewards = [_build(name, values, problems) for name, values in section.items()]
    if problems:
        raise ConfigError("\n".join(problems))
    return [reward for reward in rewards if reward is not None]


def reward_problems(section: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with ``stage.rewards``, for a stage's check."""
    try:
        build_rewards(section)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def _build(name: str, values: Any, problems: list[str]) -> Reward | None:
    """Return one reward, or None with what is wrong appended to ``problems``."""
    where = f"stage.rewards.{name}"
    if not isinstance(values, Mapping):
        problems.append(f"{where}={values!r}: expected options, for example {{kind: length}}")
        return None
    options = dict(values)
    kind = options.pop("kind", name if name in KINDS else None)
    if kind not in KINDS:
        expected = f"expected {'|'.join(KINDS)}{nearest(str(kind), KINDS)}"
        problems.append(f"{where}.kind={kind!r}: {expected}")
        return None
    if kind == "model":
        return _build_model(name, options, where, problems)
    rule, source = RULES.get(kind), ""
    if kind == "python":
        rule, source = _load_rule(options.pop("path", None), where, problems)
    if rule is None:
        return None
    weight = options.pop("weight", 1.0)
    if not isinstance(weight, int | float) or isinstance(weight, bool):
        problems.append(f"{where}.weight={weight!r}: expected a number")
        return None
    checked = _check_options(rule, options, where, problems)
    if checked is None:
        return None
    if kind in RULES:
        problems += _try_rule(rule, checked, where)
    return RuleReward(name, kind, rule, checked, float(weight), source)


def _build_model(
    name: str, options: dict[str, Any], where: str, problems: list[str]
) -> ModelReward | None:
    if "name" in options:
        problems.append(f"{where}.name is not a known key")
        return None
    reward = build(ModelReward, options | {"name": name}, where, problems)
    if reward is not None and not (Path(reward.path) / "config.json").is_file():
        problems.append(
            f"{where}.path={reward.path} is no folder of a reward model (it has no config.json); "
            "give an export of a run of stage reward"
        )
    return reward


def _check_options(
    rule: Rule, options: Mapping[str, Any], where: str, problems: list[str]
) -> dict[str, Any] | None:
    """Return a rule's options with the types of its keyword arguments."""
    hints = typing.get_type_hints(rule)
    fields: list[Any] = []
    for key, parameter in inspect.signature(rule).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            hint = hints.get(key, Any)
            if parameter.default is parameter.empty:
                fields.append((key, hint))
            else:
                # A factory, since a default may be a list.
                default = dataclasses.field(default_factory=_returning(parameter.default))
                fields.append((key, hint, default))
    kind = dataclasses.make_dataclass("Options", fields, kw_only=True)
    checked = build(kind, options, where, problems)
    return None if checked is None else dict(vars(checked))


def _returning(value: Any) -> Callable[[], Any]:
    return lambda: value


def _try_rule(rule: Rule, options: Mapping[str, Any], where: str) -> list[str]:
    """Return what a rule of ours says of options that make no sense."""
    try:
        rule("?", "?", "?", **options)
    except (ValueError, re.error) as error:
        return [f"{where}: {error}"]
    return []


def _load_rule(path: Any, where: str, problems: list[str]) -> tuple[Rule | None, str]:
    """Return the function that ``FILE.py:FUNCTION`` names, and the hash of its file."""
    file, _, name = str(path or "").rpartition(":")
    if not file.endswith(".py") or not name:
        problems.append(f"{where}.path={path!r}: expected FILE.py:FUNCTION")
        return None, ""
    if not Path(file).is_file():
        problems.append(f"{where}.path={path}: there is no file {file}")
        return None, ""
    found = _import(Path(file), where, problems)
    rule = vars(found).get(name) if found else None
    if found and not callable(rule):
        known = [key for key, value in vars(found).items() if inspect.isfunction(value)]
        problems.append(f"{where}.path={path}: {file} has no function {name}{nearest(name, known)}")
        return None, ""
    if rule is not None:
        parameters = inspect.signature(rule).parameters.values()
        places = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        if len(places) != len(RULE_ARGUMENTS):
            problems.append(
                f"{where}.path={path}: expected def {name}({', '.join(RULE_ARGUMENTS)}, *, "
                f"options), found the arguments {', '.join(places) or 'none'}"
            )
            return None, ""
    return rule, hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _import(file: Path, where: str, problems: list[str]) -> Any:
    """Run a user's file as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"reward_{file.stem}", file)
    assert spec is not None and spec.loader is not None  # a .py file has a loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        problems.append(f"{where}.path: {file} raised {type(error).__name__}: {error}")
        return None
    return module


def reward_inputs(rewards: Sequence[Reward]) -> dict[str, str]:
    """Return identities of the files of users' rules, which a resumed run must find unchanged."""
    return {
        f"stage.rewards.{reward.name}.path": reward.source
        for reward in rewards
        if isinstance(reward, RuleReward) and reward.source
    }
