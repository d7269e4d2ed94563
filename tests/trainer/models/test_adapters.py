"""What is trained: layers, modules, adapters; what does not exist or fit is refused by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.config import PeftConfig
from trainer.errors import ConfigError
from trainer.models.adapter_files import (
    AdapterFiles,
    describe_base,
    keep_base,
    known_base,
    scale_of,
)
from trainer.models.adapters import apply_peft
from trainer.models.identity import model_identity, published_name
from trainer.models.merge import merge

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def make(model_type: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    return AutoModelForCausalLM.from_config(config)


def trained_names(model: Any) -> set[str]:
    return {name for name, param in model.named_parameters() if param.requires_grad}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "base"
    make().save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """Return an adapter of ``base`` as peft itself writes it, with numbers that are not zero."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(base)
    settings = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    adapted = get_peft_model(model, settings)
    for name, param in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(param)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_last_layers_and_regex_are_trained_together() -> None:
    model = make()
    apply_peft(model, PeftConfig(mode="freeze", trainable_layers=1, trainable="lm_head"))
    names = trained_names(model)
    assert "lm_head.weight" in names and len(names) == 10
    assert {n.split(".")[2] for n in names if ".layers." in n} == {"2"}
    with pytest.raises(ConfigError, match=r"peft.trainable_layers=4: the model has 3 layers"):
        apply_peft(make(), PeftConfig(mode="freeze", trainable_layers=4))


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        (
            "llama",
            {},
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
        ("mixtral", {"num_local_experts": 2}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("gpt2", {"n_embd": 16, "n_head": 2, "n_layer": 2}, {"c_attn", "c_proj", "c_fc"}),
    ],
)
def test_auto_takes_the_linear_layers_of_the_family(
    model_type: str, changes: dict[str, Any], expected: set[str]
) -> None:
    model = apply_peft(make(model_type, **changes), PeftConfig(mode="lora", rank=2))
    assert {name.split(".")[-4] for name in trained_names(model)} == expected


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_prog", r"'q_prog' is no module of this model; did you mean q_proj"),
        ("input_layernorm", r"'input_layernorm' is no linear layer"),
        ("lm_head", r"'lm_head' is no linear layer.*peft.train_embeddings=true"),
        ("embed_tokens", r"peft.train_embeddings=true"),
    ],
)
def test_module_that_cannot_be_adapted_is_refused(target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_peft(make(), PeftConfig(mode="lora", target_modules=["v_proj", target]))


def test_adapter_continues_where_it_ended(base: Path, adapter: Path) -> None:
    """The adapter decides rank, scale and modules; the config's rank is not read."""
    peft = PeftConfig(mode="lora", rank=16, adapter=str(adapter))
    model = apply_peft(AutoModelForCausalLM.from_pretrained(base), peft, str(base))
    stored = load_file(adapter / "adapter_model.safetensors")
    params = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    assert params.keys() == stored.keys()
    assert all(torch.equal(params[name], value) for name, value in stored.items())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(5 / 3)


def test_looking_at_a_runs_base_writes_nothing(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    assert known_base(folder.parent, str(base)) == describe_base(str(base))
    assert not list(folder.iterdir())
    keep_base(folder, str(base))
    assert list(folder.iterdir())


def test_adapter_of_ours_refuses_another_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    manifest = {"format": "kuroshio-adapter-1", "base": describe_base(str(base))}
    (adapter / "kuroshio.json").write_text(json.dumps(manifest))
    AdapterFiles.open(adapter).check_base(base)
    other = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 3] += 1e-3
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"was trained on .*base \(identity .*not on model.path="):
        AdapterFiles.open(adapter).check_base(tmp_path / "other")


def test_foreign_adapter_is_compared_by_shape_and_name(
    base: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        AdapterFiles.open(adapter).check_base(base)
        assert not caplog.records
        base_elsewhere = tmp_path / "renamed"
        base_elsewhere.symlink_to(base)
        AdapterFiles.open(adapter).check_base(base_elsewhere)
    assert "whether model.path" in caplog.text
    make(hidden_size=32).save_pretrained(tmp_path / "wide")
    with pytest.raises(
        ConfigError, match=r"does not fit model.path.*\[32, 24\] there, .*\[16, 24\]"
    ):
        AdapterFiles.open(adapter).check_base(tmp_path / "wide")


def test_adapter_that_cannot_be_continued_says_why(base: Path, adapter: Path) -> None:
    def start(**changes: Any) -> None:
        peft = PeftConfig(mode="lora", adapter=str(adapter), **changes)
        apply_peft(AutoModelForCausalLM.from_pretrained(base), peft, str(base))

    with pytest.raises(ConfigError, match=r"holds no .*embed_tokens.*set it to false"):
        start(train_embeddings=True)
    weights = adapter / "adapter_model.safetensors"
    stored = load_file(weights)
    rows = torch.zeros(64, 16)
    save_file({**stored, "base_model.model.model.embed_tokens.weight": rows}, weights)
    with pytest.raises(ConfigError, match=r"also holds .*set peft.train_embeddings=true"):
        start()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(ConfigError, match="of type IA3; only LoRA"):
        start()
    weights.unlink()
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"holds no adapter_model.safetensors"):
        start()


def test_scale_follows_rank_alpha_and_their_patterns() -> None:
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": {"mlp.up_proj": 2}, "alpha_pattern": {}}
    assert scale_of(config, "model.layers.0.self_attn.q_proj") == 2
    assert scale_of(config, "model.layers.0.mlp.up_proj") == 4
    assert scale_of({**config, "use_rslora": True}, "q_proj") == 4  # 8 / sqrt(4)


def test_merge_by_hand() -> None:
    weight = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    down, up = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0], [0.0]])
    expected = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert torch.equal(merge(weight, down, up, 2.0), expected)
    magnitude = torch.tensor([10.0, 2.0])  # the rows have lengths 5 and 1
    assert torch.equal(
        merge(weight, down, up, 2.0, magnitude), torch.tensor([[6.0, 8.0], [0.0, 2.0]])
    )
    turned = merge(weight.T, down, up, 2.0, transposed=True)
    assert torch.equal(turned, expected.T)


def test_identity_is_that_of_the_weights_not_of_the_files(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert model_identity(tmp_path / "sharded") == model_identity(base)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "rounded")
    assert model_identity(tmp_path / "rounded") != model_identity(base)
    with pytest.raises(ConfigError, match=r"has no .safetensors"):
        model_identity(tmp_path)
    with pytest.raises(ConfigError, match=r"gone is not there; bring the folder back"):
        model_identity(tmp_path / "gone")


def test_large_tensors_are_sampled_from_end_to_end(tmp_path: Path) -> None:
    identities = set()
    for changed in (None, 0, 50_000, 99_999):  # the first, a middle and the last number
        tensor = torch.zeros(100_000)
        if changed == 50_000:
            tensor[14_000:60_000] = 1.0  # more than the gap between two samples
        elif changed is not None:
            tensor[changed] = 1.0
        save_file({"weight": tensor}, tmp_path / "model.safetensors")
        identities.add(model_identity(tmp_path))
    assert len(identities) == 4


def test_published_name_is_taken_from_hub_folders_and_configs(tmp_path: Path) -> None:
    hub = tmp_path / "models--someone--Model-7b" / "snapshots" / "0123"
    hub.mkdir(parents=True)
    assert published_name(str(hub)) == "someone/Model-7b"
    local = tmp_path / "local"
    local.mkdir()
    assert published_name(str(local)) is None
    (local / "config.json").write_text('{"_name_or_path": "someone/Other"}')
    assert published_name(str(local)) == "someone/Other"
    (local / "config.json").write_text('{"_name_or_path": "/data/models/other"}')
    assert published_name(str(local)) is None
