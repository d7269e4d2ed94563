"""Reward models and critics: what they start from, what they compute, what transformers loads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from family_models import SIZES, tiny_config
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from launch.final_model import padding_token
from trainer.config import ModelConfig, PeftConfig
from trainer.errors import ConfigError
from trainer.models.adapters import apply_peft, keep_adapter_config
from trainer.models.export import write_adapter
from trainer.models.load import load_model, make_config
from trainer.models.scalar_model import (
    SCALAR,
    ScalarModel,
    install_score_head,
    made_head,
    reward_statistics,
    scalar_config,
    statistics_config,
    stored_labels,
)

VOCAB = SIZES["vocab_size"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a language model and classifiers with one and with three labels."""
    folder = tmp_path_factory.mktemp("scalar")
    torch.manual_seed(0)
    sizes = {"initializer_range": 0.2}
    AutoModelForCausalLM.from_config(tiny_config("llama", **sizes)).save_pretrained(folder / "lm")
    for labels in (1, 3):
        config = tiny_config("llama", **sizes, num_labels=labels)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / str(labels))
    return {name: folder / name for name in ("lm", "1", "3")}


def load(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **head: Any) -> Any:
    model = ModelConfig("base", str(folder))
    config = scalar_config(model, VOCAB, {})
    made = made_head(model, config, seed, **head)
    loaded = load_model(model, config, dtype, seed, auto=SCALAR, made=made)
    install_score_head(loaded)
    return loaded


def test_a_language_model_gets_a_new_head_and_keeps_the_rest(folders: dict[str, Path]) -> None:
    model, stored = load(folders["lm"]), load_file(folders["lm"] / "model.safetensors")
    params = dict(model.named_parameters())
    assert params.keys() - stored.keys() == {"score.weight"}
    assert stored.keys() - params.keys() == {"lm_head.weight"}
    for name in params.keys() & stored.keys():
        assert torch.equal(params[name], stored[name])
    again, other = load(folders["lm"]).score.weight, load(folders["lm"], seed=1).score.weight
    assert torch.equal(again, model.score.weight) and not torch.equal(other, again)
    assert again.std().item() == pytest.approx(33**-0.5, rel=0.5)
    assert not load(folders["lm"], zero=True).score.weight.any()


def test_a_reward_model_keeps_its_head(folders: dict[str, Path]) -> None:
    stored = load_file(folders["1"] / "model.safetensors")["score.weight"]
    assert torch.equal(load(folders["1"], zero=True).score.weight, stored)
    assert stored_labels(folders["1"]) == 1 and stored_labels(folders["lm"]) is None


def test_what_is_no_base_of_a_reward_model_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="classifier with 3 labels"):
        load(folders["3"])
    granite = ModelConfig("granite", architecture={"model_type": "granite"})
    with pytest.raises(ConfigError, match="no sequence classifier for model_type=granite"):
        scalar_config(granite, VOCAB, {})
    model = ModelConfig("reward", str(folders["1"]))
    with pytest.raises(ConfigError, match=r"is a classifier .*give a language model"):
        load_model(model, make_config(model, VOCAB, {}), torch.float32, 0)


def test_scores_at_chosen_positions_of_packed_rows(folders: dict[str, Path]) -> None:
    """Left and right padding give transformers the same scores as packing gives us."""
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    position_ids = torch.tensor([[*range(5), *range(7)], [*range(12)]])
    model = ScalarModel(load(folders["1"]))
    selected = torch.tensor([11, 4, 15, 23])
    scores = model(ids, position_ids, selected)
    assert scores.dtype == torch.float32 and scores.requires_grad
    plain = AutoModelForSequenceClassification.from_pretrained(folders["1"]).eval()
    pieces = [ids[0, 5:], ids[0, :5], ids[1, :4], ids[1]]
    for side in ("left", "right"):
        padded, seen = torch.zeros(4, 12, dtype=torch.long), torch.zeros(4, 12, dtype=torch.long)
        for row, piece in enumerate(pieces):
            place = slice(12 - len(piece), 12) if side == "left" else slice(len(piece))
            padded[row, place], seen[row, place] = piece, 1
        expected = plain(padded, attention_mask=seen).logits[:, 0]
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_close_scores_stay_apart_in_low_precision(folders: dict[str, Path]) -> None:
    model = ScalarModel(load(folders["1"], dtype=torch.bfloat16))
    ids = torch.arange(3, 15)[None]
    scores = model(ids, torch.arange(12)[None], torch.arange(12))
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


def test_the_router_loss_of_a_mixture_comes_beside_the_scores() -> None:
    config = tiny_config("mixtral", num_labels=1)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    install_score_head(model)
    ids, places = torch.arange(3, 15)[None], torch.arange(12)[None]
    scores, router_loss = ScalarModel(model)(ids, places, torch.tensor([7]), with_router_loss=True)
    # What follows the last scored token does not count; what precedes it does.
    longer = ids.clone()
    longer[:, 8:] = 20
    again = ScalarModel(model)(longer, places, torch.tensor([7]), with_router_loss=True)
    assert router_loss.item() == pytest.approx(again[1].item(), rel=1e-6) and router_loss > 0
    assert torch.allclose(scores, again[0])
    longer[:, :8] = 20
    assert ScalarModel(model)(longer, places, torch.tensor([7]), with_router_loss=True)[1] != (
        router_loss
    )


PEFT = {
    "freeze": PeftConfig(mode="freeze", trainable_layers=1),
    "lora": PeftConfig(mode="lora", rank=4),
    "all": PeftConfig(mode="lora", rank=4, target_modules="all-linear"),
    "embeddings": PeftConfig(mode="lora", rank=4, train_embeddings=True),
}


@pytest.mark.parametrize("name", PEFT)
def test_the_head_is_always_trained_whole(folders: dict[str, Path], name: str) -> None:
    adapted = apply_peft(load(folders["lm"]), PEFT[name], str(folders["lm"]))
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad]
    whole = [n for n in trained if ".lora_" not in n]
    assert [n for n in whole if n.endswith("score.weight")] and not any(
        "score.lora" in n for n in trained
    )
    if name != "freeze":
        assert len(whole) == 1 + (name == "embeddings")


@pytest.mark.parametrize("name", ["lora", "all", "embeddings"])
def test_peft_loads_the_adapter_with_equal_scores(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    adapted = apply_peft(load(folders["lm"]), PEFT[name], str(folders["lm"]))
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    for param in trained.values():
        param.data += 0.1 * torch.randn(param.shape, generator=generator)
    keep_adapter_config(adapted, tmp_path, str(folders["lm"]))
    write_adapter(trained, lambda n: trained[n].detach(), tmp_path, torch.float32)
    ids, places = torch.arange(3, 15)[None], torch.arange(12)[None]
    scores = ScalarModel(adapted)(ids, places, torch.tensor([11]))
    base = AutoModelForSequenceClassification.from_pretrained(folders["lm"], num_labels=1)
    if name == "embeddings":  # peft has no place for it beside the matrices of an adapter
        key = "base_model.model.model.embed_tokens.weight"
        base.model.embed_tokens.weight.data = load_file(tmp_path / "adapter_model.safetensors")[key]
    plain = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(plain(ids).logits[0], scores, rtol=1e-5, atol=1e-5)
    # It goes on training from there.
    peft = dataclasses.replace(PEFT[name], adapter=str(tmp_path))
    again = apply_peft(load(folders["lm"], seed=5), peft, str(folders["lm"]))
    continued = ScalarModel(again)(ids, places, torch.tensor([11]))
    torch.testing.assert_close(continued, scores, rtol=1e-6, atol=1e-6)


def test_a_language_models_adapter_starts_a_reward_model(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["lm"])
    adapted = apply_peft(model, PEFT["lora"], str(folders["lm"]))
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    keep_adapter_config(adapted, tmp_path, str(folders["lm"]))
    write_adapter(trained, lambda n: trained[n].detach() + 1, tmp_path, torch.float32)
    classifier = load(folders["lm"])
    head = classifier.score.weight.clone()
    peft = dataclasses.replace(PEFT["lora"], adapter=str(tmp_path))
    judge = dict(apply_peft(classifier, peft, str(folders["lm"])).named_parameters())
    assert torch.equal(judge["base_model.model.score.weight"], head)
    assert all(torch.equal(judge[name], param + 1) for name, param in trained.items())


def test_statistics_are_read_back(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(statistics_config({"mean": 0.5, "std": 2.0})))
    assert reward_statistics(tmp_path) == (0.5, 2.0)
    (tmp_path / "config.json").write_text(json.dumps(statistics_config(None)))
    assert reward_statistics(tmp_path) is None


@pytest.mark.parametrize(
    ("ids", "ends", "expected"),
    [
        ((7, 0, 1), [2], 7),
        ((2, 0, 1), [2], 0),  # padding with the end token would hide the end
        ((None, None, 1), [2], 1),
        ((2, 2, 2), [2], 9),  # another special token
    ],
)
def test_padding_never_hides_the_end(ids: tuple, ends: list[int], expected: int) -> None:
    names = ("pad_token_id", "unk_token_id", "bos_token_id")
    tokenizer = SimpleNamespace(**dict(zip(names, ids, strict=True)), all_special_ids=[2, 9])
    assert padding_token(tokenizer, ends) == expected


def test_a_tokenizer_may_have_nothing_to_pad_with() -> None:
    names = ("pad_token_id", "unk_token_id", "bos_token_id")
    tokenizer = SimpleNamespace(**dict.fromkeys(names, 2), all_special_ids=[2])
    assert padding_token(tokenizer, [2]) is None
