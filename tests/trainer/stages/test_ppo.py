"""Stage ppo: it trains, resumes to the bit, and its update does not depend on how work is dealt."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_fixtures import varying
from training_support import largest_difference, read_masters, run_scenarios
from transformers import AutoConfig, AutoModelForSequenceClassification

from tokenizer.load import load_tokenizer, save_tokenizer
from trainer.config import build, load_config
from trainer.data.chats.chat import resolve_template
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


def stage_of(**changes: Any) -> dict[str, Any]:
    """Return the stage's section with some keys changed; ``__`` is a dot."""
    section = copy.deepcopy(SMALL)
    for key, value in changes.items():
        first, _, second = key.partition("__")
        if second:
            section.setdefault(first, {})[second] = value  # type: ignore[attr-defined]
        else:
            section[key] = value
    return section


def test_update_is_the_same_however_it_is_dealt(
    vary_ppo: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    alone = vary_ppo(tmp_path / "alone", loop__micro_batch_size=4, loop__max_steps=2)
    run([{"config": alone}], 1, tmp_path)
    expected = read_masters(tmp_path / "alone")
    assert any(name.startswith("critic.") for name in expected)
    ways = {
        "zero2": {"data__packing": False, "engine__zero_stage": 2, "loop__micro_batch_size": 2},
        "zero3": {"engine__zero_stage": 3},
    }
    run(
        [
            {"config": vary_ppo(tmp_path / name, loop__max_steps=2, **way), "split_everything": 1}
            for name, way in ways.items()
        ],
        2,
        tmp_path,
    )
    for name in ways:
        assert largest_difference(read_masters(tmp_path / name), expected) < 2e-5, name
    read = [read_records(tmp_path / name, "train") for name in ("alone", *ways)]
    for key in ("reward", "kl", "clip_fraction", "policy_loss", "value_loss", "entropy", "kl_coef"):
        values = [[record[key] for record in records] for records in read]
        for own in values[1:]:
            assert own == pytest.approx(values[0], rel=1e-3, abs=1e-4), key


@pytest.mark.faults(row=1)
@pytest.mark.parametrize("advantage", ["gae", pytest.param("grpo", marks=pytest.mark.slow)])
def test_a_killed_run_ends_as_an_unbroken_one(
    advantage: str, vary_ppo: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    stage = stage_of(advantage=advantage, responses_per_prompt=2, rollouts_per_step=4)
    if advantage == "gae":
        stage["update"]["critic_warmup_steps"] = 1
    change = {"stage": stage, "loop__save_every": 1, "engine__zero_stage": 2}

    def config(name: str) -> dict[str, Any]:
        values = vary_ppo(tmp_path / name, **{k: v for k, v in change.items() if k != "stage"})
        return values | {"stage": stage}

    run([{"config": config("unbroken")}], 1, tmp_path)
    expected = read_masters(tmp_path / "unbroken", 3)
    for number, way in enumerate(
        [
            {"kill_at": 1, "kill_in": "generate"},
            {"kill_at": 2, "kill_in": "backward"},
            {"kill_in_save": 2},
        ]
    ):
        values = config(f"killed_{number}")
        killed = run_scenarios([{"config": values, **way}], 1, tmp_path)
        assert killed.returncode == -9, killed.stdout
        run([{"config": values}], 1, tmp_path)
        found = read_masters(tmp_path / f"killed_{number}", 3)
        assert largest_difference(found, expected) == 0, way
        states = [read_last_state(tmp_path / name) for name in ("unbroken", f"killed_{number}")]
        assert states[0] == states[1]
    assert states[0]["reward_statistics"]["count"] == 3 * 8
    assert states[0]["kl_coef"] != 0.1


def read_last_state(run: Path) -> dict[str, Any]:
    """Return what a run's last checkpoint resumes from, without how long things took."""
    path = run / "checkpoints/step_00000003/manifest.json"
    state = json.loads(path.read_text(encoding="utf-8"))["state"]
    return {key: value for key, value in state.items() if key != "seconds"}


OFFLOAD = {"zero_stage": 3, "offload_optimizer": "cpu", "offload_params": "cpu"}
ENGINES: dict[str, dict[str, Any]] = {
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "zero3_offload": OFFLOAD,
}
PEFT = {"full": {}, "lora": {"rank": 4}, "qlora": {"rank": 4}}
ALL_WAYS = [
    (mode, engine, models)
    for mode in PEFT
    for engine in ENGINES
    for models in ("separate", "shared")
    if (mode, models) != ("full", "shared")
]
FEW_WAYS = [
    ("full", "zero3_offload", "separate"),
    ("lora", "zero3", "separate"),
    ("qlora", "zero2", "shared"),
]


def train_ways(
    ways: list[tuple[str, str, str]], vary: Callable[..., dict[str, Any]], folder: Path
) -> None:
    """Train two steps in every way on two ranks; policy and critic must have moved."""
    scenarios = []
    for mode, engine, models in ways:
        values = vary(folder / f"{mode}-{engine}-{models}", loop__max_steps=2)
        values["engine"] |= ENGINES[engine]
        values["peft"] = {"mode": mode, **PEFT[mode]}
        values["stage"] = stage_of(models=models)
        values["optim"]["lr"] = 1e-2
        scenarios.append({"config": values, "split_everything": 1})
    run(scenarios, 2, folder)
    for mode, engine, models in ways:
        run_dir = folder / f"{mode}-{engine}-{models}"
        first, second = read_records(run_dir, "train")
        assert abs(first["kl"]) < 1e-3 < abs(second["kl"]), run_dir.name
        heads = [w for name, w in read_masters(run_dir).items() if name.endswith("score.weight")]
        heads += [w for name, w in read_masters(run_dir).items() if name == "critic.weight"]
        assert len(heads) == 1 and heads[0].abs().max() > 0, run_dir.name


def test_it_trains_with_offload_and_adapters(
    vary_ppo: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    train_ways(FEW_WAYS, vary_ppo, tmp_path)


@pytest.fixture
def reward_model(ppo_config: dict[str, Any], tmp_path: Path) -> str:
    """Return the folder of a random reward model with the run's tokenizer and template."""
    config = load_config(ppo_config)
    tokenizer = load_tokenizer(str(config.tokenizer.path))
    tokenizer.chat_template = resolve_template(tokenizer, config.data.template)
    model = AutoConfig.from_pretrained(config.model.path, num_labels=1, pad_token_id=0)
    torch.manual_seed(0)
    folder = tmp_path / "reward_model"
    AutoModelForSequenceClassification.from_config(model).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return str(folder)


def test_a_reward_model_scores_and_starts_the_critic(
    vary_ppo: Callable[..., dict[str, Any]], reward_model: str, tmp_path: Path
) -> None:
    rewards = {
        "judge": {"kind": "model", "path": reward_model, "weight": 2.0},
        "length": {"high": 20, "weight": 0.5},
    }
    values = vary_ppo(tmp_path / "run", loop__max_steps=2, engine__zero_stage=3)
    values["stage"] = stage_of(rewards=rewards, critic=reward_model, critic_lr_ratio=3.0)
    run([{"config": values, "split_everything": 1}], 2, tmp_path)
    for record in read_records(tmp_path / "run", "train"):
        parts = 2.0 * record["reward/judge"] + 0.5 * record["reward/length"]
        assert record["reward"] == pytest.approx(parts)
    head = load_file(f"{reward_model}/model.safetensors")["score.weight"]
    found = read_masters(tmp_path / "run")["critic.decoder.score.weight"]
    assert 0 < (found - head).abs().max() < 0.1
    # A reward model that changes under a run is found when the run goes on.
    save_file({"score.weight": head * 2}, f"{reward_model}/model.safetensors")
    values["loop"]["max_steps"] = 3
    again = run_scenarios([{"config": values}], 2, tmp_path)
    assert "stage.critic" in again.stdout and again.returncode


@pytest.mark.slow
def test_it_trains_every_way(vary_ppo: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    train_ways([way for way in ALL_WAYS if way not in FEW_WAYS], vary_ppo, tmp_path)


@pytest.mark.slow
def test_fp16_skips_a_step_of_both(vary_ppo: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    # The first scale of 2**40 overflows in the actor's or the critic's gradients.
    values = vary_ppo(tmp_path / "run", engine__precision="fp16", loop__max_steps=2)
    values["engine"] |= {"zero_stage": 2, "initial_loss_scale_power": 40}
    run([{"config": values}], 2, tmp_path)
    records = read_records(tmp_path / "run", "train")
    assert records[0]["num_overflows"] > 0
    assert records[-1]["loss_scale"] < 2**40


@pytest.mark.slow
@pytest.mark.parametrize("advantage", ["gae", "grpo", "rloo"])
def test_reward_rises_on_three_seeds(
    advantage: str, vary_ppo: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    scenarios = []
    for seed in range(3):
        values = vary_ppo(tmp_path / str(seed), loop__max_steps=30, loop__micro_batch_size=8)
        values["loop"]["seed"] = seed
        values["stage"] = stage_of(
            rewards={"contains": {"texts": ["e"]}},
            advantage=advantage,
            rollouts_per_step=8,
            responses_per_prompt=4,
            kl__coef=0.0,
            kl__target=None,
            score__missing_eos_penalty=0.0,
        )
        values["optim"]["lr"] = 3e-3
        values["schedule"] = {"name": "constant"}
        scenarios.append({"config": values})
    run(scenarios, 1, tmp_path)
    for seed in range(3):
        rewards = [record["reward"] for record in read_records(tmp_path / str(seed), "train")]
        assert sum(rewards[-5:]) > sum(rewards[:5]) + 1.0, rewards


@pytest.mark.parametrize(
    ("changes", "section", "message"),
    [
        ({"rewards": {}}, {}, "stage.rewards is empty"),
        ({"advantage": "grpo"}, {}, "stage.responses_per_prompt to 2 or more"),
        ({"sampling__temperature": 0.0}, {}, "stage.sampling.temperature=0 is greedy"),
        ({"sampling__max_new_tokens": 500}, {}, "are 564 tokens together"),
        ({"update__num_minibatches": 7}, {}, "more than the 6 responses of a step"),
        ({"models": "shared"}, {}, "peft.mode=full; use peft=lora"),
        ({"kl__coef": 0.0}, {}, "stage.kl.coef=0 stays 0"),
        ({"update__clip_range": 0.0}, {}, "stage.update.clip_range=0.0: expected more than 0"),
        ({"score__clip": -1.0}, {}, "stage.score.clip=-1.0: expected 0 (off) or more"),
        ({"lam": 2.0}, {}, "stage.lam=2.0: expected 0 to 1"),
        ({"rewards": {"contain": {}}}, {}, "stage.rewards.contain.kind"),
        (
            {"advantage": "rloo", "responses_per_prompt": 2, "update__critic_warmup_steps": 1},
            {},
            "needs a critic, but stage.advantage=rloo has none",
        ),
        ({}, {"data__isolate_documents": False}, "data.isolate_documents=false"),
        ({}, {"data__content": "documents"}, "data.content=documents"),
    ],
)
def test_contradictions_are_named(
    changes: dict[str, Any],
    section: dict[str, Any],
    message: str,
    vary_ppo: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    fields = {key: value for key, value in stage_of(**changes).items() if key != "name"}
    stage = build(Ppo, fields, "stage", problems := [])
    assert stage is not None, problems
    config = load_config(vary_ppo(tmp_path, **section))
    assert any(message in problem for problem in stage.check(config)), stage.check(config)


def test_a_sound_config_has_no_problem(
    vary_ppo: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    fields = {key: value for key, value in SMALL.items() if key != "name"}
    stage = build(Ppo, fields, "stage", [])
    assert stage is not None
    assert stage.check(load_config(vary_ppo(tmp_path))) == []
