"""Every family through whole runs on two ranks: ZeRO-3 trains as ZeRO-0 and exports plainly.

First pretraining from scratch, then fine-tuning on conversations from the exported folder, by LoRA.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from family_models import SIZES, TINY, tiny_config
from peft import PeftModel
from training_support import largest_difference, read_losses, read_masters, run_scenarios
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from launch import export
from trainer.engine.committed import Checkpoint, Reader, list_steps

TOKENIZERS = {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"}


def make_config(base: dict[str, Any], variant: str, zero_stage: int, folder: Path) -> Any:
    """Return the config of a run of two steps; the tokenizer gives the vocabulary."""
    model_type, sizes = TINY[variant]
    values = {k: v for k, v in {**SIZES, **sizes}.items() if v is not None and k not in TOKENIZERS}
    config = copy.deepcopy(base)
    config["run_dir"] = str(folder / f"{variant}_{zero_stage}")
    config["model"]["architecture"] = {"model_type": model_type, **values}
    config["engine"]["zero_stage"] = zero_stage
    config["loop"] |= {"max_steps": 2, "keep_last": 1}
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base_config: dict[str, Any]) -> Path:
    """Train all families under both stages, in one group of processes; export those split."""
    folder = tmp_path_factory.mktemp("families")
    configs = [make_config(base_config, v, stage, folder) for v in TINY for stage in (0, 3)]
    for run_dir in run_all(configs, folder):
        export.main([str(run_dir), str(run_dir / "model")])
    return folder


def run_all(configs: list[Any], folder: Path) -> list[Path]:
    """Run all configs on two ranks; return the run folders of those under ZeRO-3."""
    scenarios = [{"config": config, "split_everything": True} for config in configs]
    done = run_scenarios(scenarios, 2, folder, 2400)
    assert done.returncode == 0, done.stdout[-5000:]
    split = [config for config in configs if config["engine"]["zero_stage"] == 3]
    for config in split:
        (Path(config["run_dir"]) / "config.yaml").write_text(yaml.safe_dump(config))
    return [Path(config["run_dir"]) for config in split]


def make_tuning(base: dict[str, Any], variant: str, zero_stage: int, folder: Path) -> Any:
    """Return the config of a run of two steps that adapts what the first run exported."""
    config = copy.deepcopy(base)
    config["run_dir"] = str(folder / f"{variant}_tuned_{zero_stage}")
    config["model"] = {"name": "base", "path": str(folder / f"{variant}_3/model")}
    config["peft"] = {"mode": "lora"}
    config["engine"]["zero_stage"] = zero_stage
    config["loop"] |= {"max_steps": 2, "keep_last": 1}
    return config


@pytest.fixture(scope="module")
def tuned(folder: Path, chat_config: dict[str, Any]) -> Path:
    """Fine-tune all families under both stages; export adapters and merged models."""
    configs = [make_tuning(chat_config, v, stage, folder) for v in TINY for stage in (0, 3)]
    for run_dir in run_all(configs, folder):
        export.main([str(run_dir), str(run_dir / "merged")])
        export.main([str(run_dir), str(run_dir / "alone"), "--adapter"])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("variant", TINY)
def test_adapters_are_tuned_alike_and_merged(tuned: Path, variant: str) -> None:
    whole, split = tuned / f"{variant}_tuned_0", tuned / f"{variant}_tuned_3"
    losses, others = read_losses(whole), read_losses(split)
    assert losses == {step: pytest.approx(others[step], rel=1e-5) for step in losses}
    assert largest_difference(read_masters(whole), read_masters(split)) < 2e-5
    base = AutoModelForCausalLM.from_pretrained(tuned / f"{variant}_3/model").eval()
    ids = torch.arange(1, 13)[None]
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, split / "alone").eval()(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(split / "merged").eval()(ids).logits
    assert (adapted - before).abs().max() > 1e-6  # it did learn, so equality says something
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", TINY)
def test_splitting_changes_nothing(folder: Path, variant: str) -> None:
    whole, split = folder / f"{variant}_0", folder / f"{variant}_3"
    losses, others = read_losses(whole), read_losses(split)
    assert len(losses) == 2
    assert losses == {step: pytest.approx(others[step], rel=1e-5) for step in losses}
    assert largest_difference(read_masters(whole), read_masters(split)) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("variant", TINY)
def test_the_export_is_the_trained_model(folder: Path, variant: str) -> None:
    split = folder / f"{variant}_3"
    model, info = AutoModelForCausalLM.from_pretrained(split / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    masters = read_masters(split)
    params = dict(model.named_parameters())
    assert params.keys() == masters.keys()
    for name, master in masters.items():
        assert torch.equal(params[name][: len(master)], master[: len(params[name])]), name


SCORED = [
    variant
    for variant in TINY
    if type(tiny_config(variant)) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
]


@pytest.fixture(scope="module")
def judged(folder: Path, preference_config: dict[str, Any]) -> Path:
    """Make reward models of all families under both stages; export classifiers."""
    configs = []
    for variant in SCORED:
        for stage in (0, 3):
            config = make_tuning(preference_config, variant, stage, folder)
            config["run_dir"] = str(folder / f"{variant}_judged_{stage}")
            configs.append(config | {"peft": {"mode": "full"}})
    for run_dir in run_all(configs, folder):
        export.main([str(run_dir), str(run_dir / "model")])
    return folder


def read_moments(run_dir: Path) -> dict[str, torch.Tensor]:
    """Return Adam's first moments of a run's last checkpoint."""
    path = list_steps(run_dir / "checkpoints")[0]
    reader = Reader(Checkpoint(path, json.loads((path / "manifest.json").read_text())))
    return {name: reader.read_whole(name, "exp_avg") for name in reader.shapes}


def assert_same_gradients(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Compare sums of gradients; Adam's steps would magnify the rounding of very small ones."""
    assert left.keys() == right.keys()
    largest = max(float(moment.norm()) for moment in right.values())
    for name, moment in left.items():
        error = float((moment - right[name]).norm())
        assert error < 1e-4 * max(float(right[name].norm()), 1e-2 * largest), name


@pytest.mark.slow
@pytest.mark.parametrize("variant", SCORED)
def test_reward_models_train_alike_and_are_plain_classifiers(judged: Path, variant: str) -> None:
    whole, split = judged / f"{variant}_judged_0", judged / f"{variant}_judged_3"
    losses, others = read_losses(whole), read_losses(split)
    assert losses == {step: pytest.approx(others[step], rel=1e-5) for step in losses}
    assert_same_gradients(read_moments(whole), read_moments(split))
    model, info = AutoModelForSequenceClassification.from_pretrained(
        split / "model", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    masters, params = read_masters(split), dict(model.named_parameters())
    assert params.keys() == masters.keys()
    for name, master in masters.items():
        assert torch.equal(params[name], master), name
    assert model.config.pad_token_id == 0 and params["score.weight"].shape[0] == 1
