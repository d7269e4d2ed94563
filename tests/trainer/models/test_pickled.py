"""Weights in pickles: tensors are read, code in them is never run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from trainer.config import ModelConfig
from trainer.errors import ConfigError
from trainer.models.load import load_model, make_config
from trainer.models.pickled import only_tensors


class Hostile:
    """Unpickling it runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model folder with a ``pytorch_model.bin`` and no safetensors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    model = LlamaForCausalLM(config)
    config.save_pretrained(path)
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    return path


def load(folder: Path) -> torch.nn.Module:
    model = ModelConfig("m", str(folder))
    return load_model(model, make_config(model, 32, {}), torch.float32, 0)


def test_tensors_in_a_pickle_are_read(folder: Path) -> None:
    stored = torch.load(folder / "pytorch_model.bin", weights_only=True)
    read = load(folder).state_dict()
    assert all(torch.equal(value, read[name]) for name, value in stored.items())


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pickle_is_not_run(folder: Path, tmp_path: Path, is_zip: bool) -> None:
    mark, hostile = tmp_path / "mark", tmp_path / "hostile"
    hostile.mkdir()
    (hostile / "config.json").write_text((folder / "config.json").read_text())
    content = {"model.norm.weight": torch.ones(8), "x": Hostile(mark)}
    torch.save(content, hostile / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ConfigError, match=r"would run code .*system.*it was not run.*save_pretr"):
        load(hostile)
    assert not mark.exists()


@pytest.mark.parametrize("version", ["2.9.1", "2.6.0+cu124", "2.0"])
def test_a_torch_that_pickles_could_fool_reads_none(folder: Path, version: str) -> None:
    refused = pytest.raises(ConfigError, match=r"install torch >= 2\.10, or convert")
    with refused, only_tensors(folder, version):
        pytest.fail("the block must not begin")


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+git1", "2.13.0+cpu", "3.0"])
def test_a_newer_torch_may(folder: Path, version: str) -> None:
    with only_tensors(folder, version):
        pass


def test_beside_safetensors_no_pickle_counts(tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).touch()
    with only_tensors(tmp_path, "2.0"):
        pass
