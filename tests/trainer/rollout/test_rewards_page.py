"""What docs/rewards.md shows works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from launch.compose import compose_values
from trainer.rollout.rewards import KINDS, RuleReward, build_rewards

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs/rewards.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change into a folder with the page's rule and a reward model's folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "REWARD_MODEL").mkdir()
    (tmp_path / "REWARD_MODEL/config.json").write_text("{}")
    (source,) = (body for language, body in BLOCKS if language == "python")
    (tmp_path / source.splitlines()[0].removeprefix("# ")).write_text(source, encoding="utf-8")
    return tmp_path


def test_the_section_is_built(folder: Path) -> None:
    (section,) = (body for language, body in BLOCKS if language == "yaml")
    rewards = build_rewards(yaml.safe_load(section)["stage"]["rewards"])
    _, length, no_lists, polite = rewards
    assert [reward.weight for reward in rewards] == [1.0, 0.5, -1.0, 1.0]
    rules = [rule for rule in (length, no_lists, polite) if isinstance(rule, RuleReward)]
    prompts, responses = ["?", "?"], ["好的，謝謝。", "要點：\n- 一\n- 二"]
    found = [rule.score(prompts, responses, [None, None]).tolist() for rule in rules]
    assert found == [[6 / 20, 11 / 20], [0.0, 1.0], [1.0, 0.0]]


def test_the_commands_compose(folder: Path) -> None:
    lines = next(body for language, body in BLOCKS if language == "bash").splitlines()
    names = []
    for line in lines:
        overrides = re.findall(r"'(\+stage\.rewards\.[^']+)'", line)
        section = compose_values(["stage=ppo", *overrides])["stage"]["rewards"]
        names += [reward.name for reward in build_rewards(section)]
    assert names == ["judge", "length", "language"]


def test_every_kind_is_in_the_table() -> None:
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE) == list(KINDS)
