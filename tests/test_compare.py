"""The demo's comparison of models tuned on preferences: drawn answers, scores, divergence."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from chat_tokenizers import byte_level_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from trainer.data.chats.templates import read_builtin
from trainer.inference.loading import Loading, load_chat_model

SAMPLES = Path(__file__).resolve().parents[1] / "samples"


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("samples_compare", SAMPLES / "compare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two language models and a classifier, all random, that share a tokenizer."""
    folder = tmp_path_factory.mktemp("compare")
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = read_builtin("chatml")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=0,
    )
    classes = {
        "one": LlamaForCausalLM,
        "other": LlamaForCausalLM,
        "judge": LlamaForSequenceClassification,
    }
    for seed, (name, cls) in enumerate(classes.items()):
        torch.manual_seed(seed)
        model: Any = cls(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)  # far enough from each other to be told apart
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in classes}


def test_a_tie_is_half_a_win(compare: ModuleType) -> None:
    assert compare.win_rate([1.0, 2.0, 0.0, 5.0], [0.0, 2.0, 3.0, 4.0]) == 62.5


def test_logps_and_scores_are_those_of_the_models(
    compare: ModuleType, folders: dict[str, Path]
) -> None:
    model = load_chat_model(folders["one"], Loading(precision="fp32"))
    answers = compare.draw_answers(model, ["海流", "The fox?"])
    assert all(0 < length <= compare.MAX_NEW_TOKENS for length in answers.lengths)
    ids, start = answers.sequences[1], answers.prompt_lengths[1]
    assert model.tokenizer.decode(ids[:start]).endswith("<|im_start|>assistant\n")
    with torch.no_grad():
        labels = torch.tensor([[-100] * start + ids[start:]])
        loss = model.model(input_ids=torch.tensor([ids]), labels=labels).loss
    assert answers.logps[1] == pytest.approx(-float(loss) * answers.lengths[1], rel=1e-4)
    judge = LlamaForSequenceClassification.from_pretrained(folders["judge"]).eval()
    single = [compare.score(judge, [row])[0] for row in answers.sequences]
    assert compare.score(judge, answers.sequences) == pytest.approx(single)
    assert single[0] != pytest.approx(single[1])


def test_a_model_ties_with_itself_and_strays_from_itself_by_nothing(
    compare: ModuleType, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"問題{i}", "check": ".*"} for i in range(12)]
    monkeypatch.setitem(sys.modules, "preference", _Rules(rows))
    models = {"first": folders["one"], "same": folders["one"], "other": folders["other"]}
    first, same, other = compare.compare(models, folders["judge"])
    assert same | {"model": "first"} == first
    assert first["wins_by_score"] == first["wins_by_rule"] == 50
    assert first["kl_per_answer"] == pytest.approx(0, abs=1e-4)
    assert other["kl_per_answer"] > 1
    assert other["wins_by_score"] != 50
    assert first["right"] == 100 and first["courteous"] == 0


class _Rules(ModuleType):
    """What ``compare`` asks of ``preference``."""

    def __init__(self, rows: list[dict[str, str]]) -> None:
        super().__init__("preference")
        self.read_test_rows = lambda: rows
        self.is_courteous = lambda answer: False
        self.is_right = lambda row, answer: True
