"""Code that a model folder brings runs only if exactly that code was allowed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from trainer.config import ModelConfig
from trainer.errors import ConfigError
from trainer.models.load import load_model, make_config, measure
from trainer.models.remote_code import code_pin

CONFIGURATION = """
from pathlib import Path
from transformers import LlamaConfig

Path(__file__).resolve()
class StrangeConfig(LlamaConfig):
    model_type = "strange"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_strange import StrangeConfig

class StrangeForCausalLM(LlamaForCausalLM):
    config_class = StrangeConfig
"""


@pytest.fixture
def strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a model folder of a type that only its own code knows."""
    from transformers import LlamaConfig, LlamaForCausalLM, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "strange"
    config = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "configuration_strange.py").write_text(CONFIGURATION)
    (folder / "modeling_strange.py").write_text(MODELING)
    rewrite(
        folder,
        model_type="strange",
        architectures=["StrangeForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_strange.StrangeConfig",
            "AutoModelForCausalLM": "modeling_strange.StrangeForCausalLM",
        },
    )
    return folder


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_code_is_refused_with_what_allows_it(strange: Path) -> None:
    with pytest.raises(ConfigError, match=r"configuration_strange.py, modeling") as error:
        make_config(ModelConfig("m", str(strange)), 32, {})
    found = re.search(r"model.trust_remote_code=true model.revision=(\w+)", str(error.value))
    assert found and found[1] == code_pin(strange)


def test_allowed_code_runs_and_changed_code_does_not(strange: Path) -> None:
    allowed = ModelConfig("m", str(strange), trust_remote_code=True, revision=code_pin(strange))
    config = make_config(allowed, 32, {})
    assert measure(config)[0] > 0
    model = load_model(allowed, config, torch.float32, 0)
    assert type(model).__name__ == "StrangeForCausalLM"
    stored = load_model(allowed, config, torch.float32, 0).state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    with (strange / "modeling_strange.py").open("a") as file:
        file.write("import os\n")
    with pytest.raises(ConfigError, match=r"is another version than the one allowed"):
        make_config(allowed, 32, {})


def test_code_of_a_known_architecture_is_not_run(strange: Path) -> None:
    rewrite(strange, model_type="llama")
    config = make_config(ModelConfig("m", str(strange)), 32, {})
    assert type(config).__name__ == "LlamaConfig"


def test_code_elsewhere_cannot_be_pinned(strange: Path) -> None:
    rewrite(strange, auto_map={"AutoConfig": "someone/code--configuration.C"})
    allowed = ModelConfig("m", str(strange), trust_remote_code=True, revision=code_pin(strange))
    with pytest.raises(ConfigError, match="code in another repository"):
        make_config(allowed, 32, {})


def test_quantised_folder_is_refused(strange: Path) -> None:
    rewrite(strange, model_type="llama", quantization_config={"quant_method": "gptq"})
    with pytest.raises(ConfigError, match=r"already quantised \(gptq\)"):
        make_config(ModelConfig("m", str(strange)), 32, {})


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": {"text_config": "someone/kernel@main:fast"}},
        {"text_config": {"attn_implementation": "someone/kernel"}},
        {"experts_implementation": "someone/kernel"},
    ],
)
def test_kernels_of_a_repository_are_not_fetched(strange: Path, changes: dict[str, object]) -> None:
    rewrite(strange, model_type="llama", **changes)
    with pytest.raises(ConfigError, match=r"names compiled code in a repository"):
        make_config(ModelConfig("m", str(strange)), 32, {})


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "0123abc", "0" * 40, "0" * 64])
def test_only_the_hash_of_the_code_allows_it(strange: Path, revision: str | None) -> None:
    """A branch, a tag, a short hash or another commit allow nothing."""
    named = ModelConfig("m", str(strange), trust_remote_code=True, revision=revision)
    with pytest.raises(ConfigError, match=f"model.revision={revision} is not the code"):
        make_config(named, 32, {})
