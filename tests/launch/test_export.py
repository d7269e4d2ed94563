"""A run exported as a plain folder computes what was trained, in plain transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from training_support import read_masters, run_scenarios
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import export
from trainer.config import DataConfig
from trainer.disk import hash_file
from trainer.engine.committed import list_steps
from trainer.errors import CheckpointError, ConfigError
from trainer.inference.run_model import find_run_checkpoint, load_run

Vary = Callable[..., dict[str, Any]]


def freeze(config: dict[str, Any]) -> Path:
    """Put the config where the command line puts it; return the run folder."""
    run_dir = Path(config["run_dir"])
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    return run_dir


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, base_config: dict[str, Any]
) -> dict[str, Path]:
    """Train a tied and an untied model on two ranks under ZeRO-3 and export both in shards."""
    import copy

    folder = tmp_path_factory.mktemp("export")
    configs = {}
    for name in ("tied", "untied"):
        config = copy.deepcopy(base_config)
        config["run_dir"] = str(folder / f"run_{name}")
        config["model"]["architecture"]["tie_word_embeddings"] = name == "tied"
        config["engine"]["zero_stage"] = 3
        config["loop"] |= {"max_steps": 3, "eval_chars": 2000}
        configs[name] = config
    done = run_scenarios([{"config": c} for c in configs.values()], 2, folder)
    assert done.returncode == 0, done.stdout
    for name, config in configs.items():
        run_dir = freeze(config)
        export.main([str(run_dir), str(folder / name), "--max-shard-gb", "0.00006"])
    return {name: folder / name for name in configs} | {"folder": folder}


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_plain_transformers_computes_the_trained_logits(
    exported: dict[str, Path], name: str
) -> None:
    folder = exported[name]
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.tie_word_embeddings is (name == "tied")
    masters = read_masters(exported["folder"] / f"run_{name}")
    parameters = dict(model.named_parameters())
    assert parameters.keys() == masters.keys()
    for key, value in masters.items():
        assert torch.equal(parameters[key], value), key
    reference = AutoModelForCausalLM.from_config(model.config)
    reference.load_state_dict(masters, strict=False)
    reference.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The morning train runs along the sea.", return_tensors="pt").input_ids
    assert torch.equal(model.eval()(ids).logits, reference.eval()(ids).logits)


def test_padded_rows_are_never_generated(exported: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported["untied"])
    tokenizer = AutoTokenizer.from_pretrained(exported["untied"])
    assert model.config.vocab_size == 448 and len(tokenizer) == 400
    with torch.no_grad():  # the worst case: every padded row scores highest
        model.lm_head.weight[400:] = model.lm_head.weight.sum(0) * 100
    ids = tokenizer("The", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=12, do_sample=True)
    assert int(out.max()) < 400


def test_card_names_data_hyperparameters_and_results(exported: dict[str, Path]) -> None:
    card = (exported["tied"] / "README.md").read_text(encoding="utf-8")
    lines = (exported["folder"] / "run_tied/metrics.jsonl").read_text().splitlines()
    last = [r for r in map(json.loads, lines) if r["split"] == "eval"][-1]
    assert f"{last['sources']['en']['bits_per_character']:.4f}" in card
    assert "lr 0.001" in card and "ZeRO-3" in card and "2 ranks" in card
    manifest = json.loads((exported["tied"] / "kuroshio.json").read_text())
    assert manifest["vocab_size"] == 400 and manifest["embedding_rows"] == 448


def test_exported_folder_trains_on(exported: dict[str, Path], vary: Vary, tmp_path: Path) -> None:
    """A second run starts where the first ended; lora merges at export as peft merges."""
    config = vary(tmp_path / "next", loop__max_steps=2, engine__zero_stage=2)
    config["model"] = {"name": "next", "path": str(exported["tied"])}
    config["tokenizer"]["path"] = None
    config["peft"] = {"mode": "lora", "rank": 4, "alpha": 8.0, "train_embeddings": True}
    done = run_scenarios([{"config": config}], 2, tmp_path)
    assert done.returncode == 0, done.stdout
    export.main([str(freeze(config)), str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    saved = read_masters(tmp_path / "next")
    assert {n.split(".")[-3] for n in saved if ".lora_" in n} == {"lora_A", "lora_B"}
    assert "base_model.model.model.embed_tokens.weight" in saved
    expected = merge_with_peft(exported["tied"], saved)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(merged(ids).logits, expected(ids).logits, rtol=0, atol=1e-5)
    first = AutoModelForCausalLM.from_pretrained(exported["tied"])
    assert (merged(ids).logits - first(ids).logits).abs().max() > 1e-4  # it learnt something


def merge_with_peft(base: Path, saved: dict[str, torch.Tensor]) -> Any:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(base)
    lora = LoraConfig(r=4, lora_alpha=8.0, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    _, unexpected = adapted.load_state_dict(saved, strict=False)
    assert not unexpected
    return adapted.merge_and_unload()


def test_stored_copy_of_a_tied_weight_is_left_out(tmp_path: Path) -> None:
    from trainer.models.export import Weights

    stale = {"embed.weight": torch.zeros(4, 2), "lm_head.weight": torch.zeros(4, 2)}
    save_file(stale, tmp_path / "model.safetensors")
    trained = torch.ones(4, 2)
    weights = Weights(
        {"embed.weight": [4, 2]}, lambda _: trained, tmp_path, None, aliases={"lm_head.weight"}
    )
    assert weights.shapes == {"embed.weight": [4, 2]}
    assert torch.equal(weights.read("embed.weight"), trained)


def test_adapters_that_cannot_be_merged_are_not_dropped(tmp_path: Path) -> None:
    from trainer.models.export import Weights

    names = ["base_model.model.embed.lora_embedding_A", "base_model.model.q.lora_A.default.weight"]
    with pytest.raises(CheckpointError, match="2 adapters are not of linear layers"):
        Weights({name: [2, 4] for name in names}, torch.zeros, None, {})


def add_critic(run_dir: Path) -> None:
    """Write a critic's weights into a run's newest checkpoint, as stage ppo does."""
    folder = list_steps(run_dir / "checkpoints")[0]
    path = folder / "rank_00002.safetensors"
    name = "critic.decoder.score.weight"
    save_file({f"{name}|{kind}@0": torch.ones(32) for kind in ("master", "exp_avg")}, path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    manifest["parameters"][name] = [1, 32]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_of_a_policy_and_its_critic_the_policy_is_exported(
    exported: dict[str, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(exported["folder"] / "run_untied", run_dir)
    add_critic(run_dir)
    export.main([str(run_dir), str(tmp_path / "policy")])
    policy, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "policy", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    loaded, _ = load_run(run_dir, None, find_run_checkpoint(run_dir, None), torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(exported["untied"])
    ids = torch.arange(20)[None]
    for model in (policy, loaded):
        assert torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)


def test_a_reward_run_writes_no_text(exported: dict[str, Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(exported["folder"] / "run_untied", run_dir)
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config | {"stage": {"name": "reward"}}))
    checkpoint = find_run_checkpoint(run_dir, None)
    with pytest.raises(ConfigError, match=r"is a reward run.*kuroshio export"):
        load_run(run_dir, None, checkpoint, torch.float32)


def test_what_cannot_be_exported_says_why(exported: dict[str, Path], tmp_path: Path) -> None:
    run = exported["folder"] / "run_tied"
    with pytest.raises(CheckpointError, match=r"step=99: manifest unreadable.*there: 3"):
        export.main([str(run), str(tmp_path / "out"), "--step", "99"])
    with pytest.raises(ConfigError, match="exists"):
        export.main([str(run), str(exported["tied"])])
    with pytest.raises(CheckpointError, match="cannot be read"):
        export.main([str(tmp_path), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["documents", "conversations", "preferences", "prompts"])
def test_ids_that_end_an_answer_are_written_for_chats(content: Any, chat_folder: Path) -> None:
    config = SimpleNamespace(data=DataConfig({}, content=content))
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    expected = {} if content == "documents" else {"eos_token_id": [tokenizer.eos_token_id]}
    assert export._stop_ids(config, tokenizer) == expected  # type: ignore[arg-type]
