"""Stage ppo: it trains, resumes to the bit, and its update does not depend on how work is dealt."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_fixtures import varying
from training_support import largest_difference, read_masters, run_scenarios

from trainer.config import build, load_config
from trainer.data.prepared.prepare import ensure_prepared
from trainer.stages.ppo import Ppo

SMALL = {
    "name": "ppo",
    "rewards": {"contains": {"texts": ["a", "the"]}},
    "rollouts_per_step": 6,
    "sampling": {"max_new_tokens": 12},
    "update": {"epochs": 2, "num_minibatches": 2, "entropy_coef": 0.01},
    "kl": {"coef": 0.1, "target": 2.0, "horizon": 20},
    "score": {"scale": True, "clip": 3.0, "missing_eos_penalty": 0.5},
}


@pytest.fixture(scope="module")
def ppo_config(dpo_config: dict[str, Any]) -> dict[str, Any]:
    """Return a complete config of stage ppo on the prompts of the pairs, prepared."""
    values = copy.deepcopy(dpo_config)
    values["stage"] = copy.deepcopy(SMALL)
    values["data"] |= {"content": "prompts", "max_length": 64}
    values["loop"] |= {"max_steps": 3, "micro_batch_size": 1}
    values["optim"] |= {"lr": 1e-3, "weight_decay": 0.0}
    config = load_config(values)
    ensure_prepared(config.data, str(config.tokenizer.path))
    return values


@pytest.fixture
def vary_ppo(ppo_config: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """Return a function that copies the config of stage ppo with dotted keys changed."""
    return varying(ppo_config)


def read_records(run_dir: Path, split: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == split]


def run(scenarios: list[dict[str, Any]], num_ranks: int, folder: Path) -> None:
    done = run_scenarios(scenarios, num_ranks, folder)
    assert done.returncode == 0, done.stdout


def test_a_step_records_what_it_did(
    vary_ppo: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    values = vary_ppo(tmp_path / "run", loop__eval_chars=300)
    run([{"config": values}], 1, tmp_path)
    records = read_records(tmp_path / "run", "train")
    assert [record["step"] for record in records] == [1, 2, 3]
    for record in records:
        for key in ("reward", "kl", "entropy", "clip_fraction", "value_clip_fraction"):
            assert key in record, key
        assert 1 <= record["response_length"] <= 12
        assert record["reward_min"] <= record["reward"] <= record["reward_max"]
        assert record["rollout_seconds"] > 0 and record["update_seconds"] > 0
    assert records[0]["kl"] == pytest.approx(0, abs=1e-4)  # the policy is still the reference
    assert records[2]["kl"] != 0
    assert records[1]["kl_coef"] == pytest.approx(0.1 * (1 - 0.2 * 6 / 20))
    _, evaluation = read_records(tmp_path / "run", "eval")
    (figures,) = evaluation["sources"].values()
    assert {"reward", "kl", "response_length", "eos_share"} <= figures.keys()
    _, table = read_records(tmp_path / "run", "table")
    assert {"prompt", "response", "reward"} <= table["rows"][0].keys()
