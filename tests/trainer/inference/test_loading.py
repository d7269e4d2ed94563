"""Model folders, runs and adapters answer with the weights that belong to them."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from chat_fixtures import UNKNOWN, WHO
from family_models import tiny_model
from safetensors.torch import load_file, save_file
from training_support import read_masters, run_scenarios
from transformers import AutoModelForCausalLM

from trainer.data.chats.conversation import Message
from trainer.errors import CheckpointError, ConfigError
from trainer.inference import run_model
from trainer.inference.chat_model import ChatModel
from trainer.inference.decoding import Decoding
from trainer.inference.loading import Loading, load_chat_model
from trainer.models.export import Weights

PLAIN = Loading(precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def runs(
    base_config: dict[str, Any], chat_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Train a model from scratch and adapters on the chat model, a few steps each."""
    folder = tmp_path_factory.mktemp("runs")
    scratch, adapted = copy.deepcopy(base_config), copy.deepcopy(base_config)
    adapted["model"] = {"name": "poet", "path": str(chat_folder)}
    adapted["tokenizer"] = {"path": str(chat_folder)}  # with its chat template
    adapted["peft"] = {"mode": "lora", "rank": 4}
    for name, config in (("scratch", scratch), ("adapted", adapted)):
        config["run_dir"] = str(folder / name)
        config["loop"] |= {"max_steps": 4, "save_every": 2}
    done = run_scenarios([{"config": scratch}, {"config": adapted}], 1, folder)
    assert done.returncode == 0, done.stdout
    for config in (scratch, adapted):
        (Path(config["run_dir"]) / "config.yaml").write_text(yaml.safe_dump(config))
    return {"scratch": folder / "scratch", "adapted": folder / "adapted"}


@pytest.fixture(scope="module")
def adapter(chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return an adapter that peft wrote, and the adapted model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(chat_folder)
    wanted = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(base, wanted)
    folder = tmp_path_factory.mktemp("adapter") / "poems"
    adapted.save_pretrained(folder)
    return folder, adapted


def logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits


def weights(chat_model: ChatModel) -> dict[str, torch.Tensor]:
    return dict(chat_model.model.named_parameters())


def test_run_from_scratch_has_the_newest_weights_or_those_asked_for(
    runs: dict[str, Path],
) -> None:
    run = runs["scratch"]
    with pytest.raises(ConfigError, match="template=auto: the tokenizer has no chat_template"):
        load_chat_model(run, PLAIN)
    for step, checkpoint in ((None, 4), (2, 2)):
        loading = Loading(precision="fp32", device="cpu", template="plain", step=step)
        loaded = weights(load_chat_model(run, loading))
        masters = read_masters(run, checkpoint)
        assert loaded.keys() == masters.keys()
        assert all(torch.equal(loaded[name], masters[name]) for name in masters)
    missing = Loading(template="plain", step=3)
    with pytest.raises(CheckpointError, match=r"step=3: .*checkpoints there: 4, 2"):
        load_chat_model(run, missing)


def test_run_with_adapters_merges_them_into_its_base(
    runs: dict[str, Path], chat_folder: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    chat_model = load_chat_model(runs["adapted"], PLAIN)
    prompt = chat_model.prompt_ids([Message("user", WHO)])
    from launch import export

    export.main([str(runs["adapted"]), str(tmp_path / "adapter"), "--adapter"])
    base = AutoModelForCausalLM.from_pretrained(chat_folder)
    plain = logits(base, prompt)
    peft = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"), prompt)
    merged = logits(chat_model.model, prompt)
    assert float((merged - peft).abs().max()) < 1e-5
    assert float((merged - plain).abs().max()) > 1e-3
    exported = load_chat_model(
        tmp_path / "adapter", Loading(precision="fp32", device="cpu", base=str(chat_folder))
    )
    assert float((logits(exported.model, prompt) - merged).abs().max()) < 1e-5


def test_moved_base_is_named(runs: dict[str, Path], chat_folder: Path, tmp_path: Path) -> None:
    run, base = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(runs["adapted"], run)
    shutil.copytree(chat_folder, base)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["path"] = "/nowhere/poet"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=r"was trained on /nowhere/poet.*give base=FOLDER"):
        load_chat_model(run, PLAIN)
    moved = load_chat_model(run, Loading(precision="fp32", device="cpu", base=str(base)))
    there = load_chat_model(runs["adapted"], PLAIN)
    assert all(torch.equal(value, weights(there)[name]) for name, value in weights(moved).items())
    changed = load_file(base / "model.safetensors")
    changed[min(changed)] += 1
    save_file(changed, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"elsewhere is another model.*give base=FOLDER of the"):
        load_chat_model(run, Loading(base=str(base)))
    with pytest.raises(ConfigError, match="trained from scratch, it has no base"):
        load_chat_model(runs["scratch"], Loading(base=str(base), template="plain"))


def test_a_run_answers_with_what_its_base_keeps_beside_parameters(tmp_path: Path) -> None:
    """DeepSeek-V3's routers hold a bias that no checkpoint of ours does."""
    model, again = tiny_model("deepseek_v3"), tiny_model("deepseek_v3")
    name = next(name for name in model.state_dict() if name.endswith("e_score_correction_bias"))
    model.get_buffer(name).fill_(0.7)
    model.save_pretrained(tmp_path)
    params = dict(model.named_parameters())
    shapes = {name: list(param.shape) for name, param in params.items()}
    run_model._fill(again, Weights(shapes, lambda n: params[n].detach(), tmp_path, None), tmp_path)
    assert torch.equal(again.get_buffer(name), model.get_buffer(name))


def test_adapter_folder_computes_what_peft_does(adapter: tuple[Path, Any]) -> None:
    folder, adapted = adapter
    chat_model = load_chat_model(folder, PLAIN)
    prompt = chat_model.prompt_ids([Message("user", WHO)])
    difference = logits(chat_model.model, prompt) - logits(adapted, prompt)
    assert float(difference.abs().max()) < 1e-5
    assert chat_model.name == "poems"


def test_adapter_without_its_base_says_so(adapter: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "lost"
    shutil.copytree(adapter[0], folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "somebody/poet-7b"
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"adapter of the model somebody/poet-7b.*base=FOLDER"):
        load_chat_model(folder, PLAIN)


def test_identity_tells_weights_apart(
    runs: dict[str, Path], chat_folder: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(chat_folder, copied)
    first = load_chat_model(chat_folder, PLAIN)
    assert first.identity == load_chat_model(copied, PLAIN).identity
    scratch = Loading(template="plain", step=2)
    later = Loading(template="plain")
    steps = {load_chat_model(runs["scratch"], loading).identity for loading in (scratch, later)}
    assert len({first.identity, *steps}) == 3


def test_folders_own_generation_settings_do_not_leak(chat_folder: Path, tmp_path: Path) -> None:
    """Published models sample, penalise and stop by a file that nobody asked for here."""
    folder = tmp_path / "opinionated"
    shutil.copytree(chat_folder, folder)
    settings = {"do_sample": True, "temperature": 5.0, "min_new_tokens": 50, "max_length": 7}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    chat_model = load_chat_model(folder, PLAIN)
    prompt = chat_model.prompt_ids([Message("user", WHO)])
    greedy = Decoding(max_new_tokens=60, temperature=0.0)
    assert chat_model.answer([prompt], greedy, ["a"])[0].text == UNKNOWN.strip()


def test_template_of_a_file_replaces_the_folders(chat_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "shout.jinja"
    turn = "{{ m.content | upper }}!{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    path.write_text("{% for m in messages %}" + turn + "{% endfor %}")
    loading = Loading(precision="fp32", device="cpu", template=str(path))
    chat_model = load_chat_model(chat_folder, loading)
    assert chat_model.tokenizer.decode(chat_model.prompt_ids([Message("user", "a")])) == "A!"
