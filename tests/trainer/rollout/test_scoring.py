"""Reward models read responses as plain transformers would, or are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_tokenizers import byte_level_tokenizer, sentencepiece_tokenizer
from transformers import AutoModelForSequenceClassification, LlamaConfig

from tokenizer.load import load_tokenizer, num_ids, save_tokenizer
from trainer.data.chats.chat import closing_ids, encode_conversation
from trainer.data.chats.conversation import Conversation, Message
from trainer.data.chats.templates import read_builtin
from trainer.errors import ConfigError, DataError, NumericsError
from trainer.models.scalar_model import ScalarModel, install_score_head
from trainer.rollout import scoring
from trainer.rollout.answer_rows import Layout
from trainer.rollout.collection import Rollout
from trainer.rollout.generate import Response
from trainer.rollout.prompts import Prompt
from trainer.rollout.rewards import RuleReward, build_rewards
from trainer.rollout.scoring import Scorer

TALKS = [
    ("今天天氣如何？", "今天是晴天。"),
    ("What is 1 + 1?", "2"),
    ("fox", "The quick brown fox"),
]
LAYOUT = Layout(max_length=200, micro_batch_size=2, packing=True, pad_token_id=0)


def make_folder(folder: Path, tokenizer: Any, template: str, **settings: Any) -> str:
    """Write a random reward model with its tokenizer; return the folder."""
    tokenizer.chat_template = read_builtin(template)
    torch.manual_seed(len(folder.name))
    config = LlamaConfig(
        vocab_size=num_ids(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
        pad_token_id=0,
        initializer_range=0.3,
        **{"max_position_embeddings": 256, **settings},
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return reward models: of the policy's base, and of others."""
    root = tmp_path_factory.mktemp("judges")
    stats = {"reward_mean": 0.5, "reward_std": 2.0}
    return {
        "same": make_folder(root / "same", byte_level_tokenizer(), "qwen", **stats),
        "other": make_folder(root / "other", sentencepiece_tokenizer(), "plain"),
        "template": make_folder(root / "template", byte_level_tokenizer(), "plain"),
        "short": make_folder(
            root / "short", byte_level_tokenizer(), "qwen", max_position_embeddings=20
        ),
    }


def open_model(folder: str) -> ScalarModel:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    install_score_head(model)
    return ScalarModel(model).eval()


class FakeEngine:
    """Computes reward models as the engine does, in one process."""

    def __init__(self, folders: dict[str, str]) -> None:
        self.device, self.rank, self.world_size = torch.device("cpu"), 0, 1
        self.models = {f"reward:{name}": open_model(path) for name, path in folders.items()}

    def __call__(self, part: str, **inputs: torch.Tensor) -> torch.Tensor:
        return self.models[part](**inputs)


@pytest.fixture(scope="module")
def engine(folders: dict[str, str]) -> Any:
    return FakeEngine(folders)


def make_scorer(folders: dict[str, str], section: dict[str, Any]) -> Scorer:
    return Scorer(build_rewards(section), load_tokenizer(folders["same"]), folders["same"])


@pytest.fixture(scope="module")
def rollout(folders: dict[str, str]) -> Rollout:
    """Return responses that ended, but for the last one."""
    tokenizer = load_tokenizer(folders["same"])
    prompts, responses = [], []
    for number, (question, answer) in enumerate(TALKS):
        chat = {"messages": [{"role": "user", "content": question}], "tools": None}
        ids = tokenizer.apply_chat_template(
            chat["messages"], add_generation_prompt=True, return_dict=False
        )
        prompts.append(Prompt(ids, answer, chat))
        stopped = number < len(TALKS) - 1
        end = [tokenizer.convert_tokens_to_ids("<|im_end|>")] if stopped else []
        written = tokenizer.encode(answer, add_special_tokens=False)
        responses.append(Response([*written, *end], stopped))
    return Rollout(prompts, responses)


def score_plainly(folder: str, ids: list[list[int]]) -> list[float]:
    """Return plain transformers' scores of sequences, one by one."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row])).logits.item() for row in ids]


def render(folder: str, num: int) -> list[list[int]]:
    """Return the first talks as reward models are trained on them, to where they are scored."""
    tokenizer = load_tokenizer(folder)
    chats = [
        encode_conversation(
            tokenizer, Conversation((Message("user", asked), Message("assistant", answer)))
        ).chats[-1]
        for asked, answer in TALKS[:num]
    ]
    return [chat.input_ids[: int(chat.weights.nonzero()[0][-1]) + 1].tolist() for chat in chats]


def test_the_policys_tokens_are_scored_where_the_model_was_trained_to(
    folders: dict[str, str], engine: Any, rollout: Rollout
) -> None:
    scorer = make_scorer(folders, {"same": {"kind": "model", "path": folders["same"]}})
    found = scorer.score(engine, rollout, LAYOUT)["same"]
    cut_off = [*rollout.prompts[-1].ids, *rollout.responses[-1].ids]
    wanted = score_plainly(folders["same"], [*render(folders["same"], 2), cut_off])
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(wanted, abs=1e-5)
    assert found.std() > 0.1
    # The template ends with a line break, which no policy writes and no score stands at.
    assert closing_ids(load_tokenizer(folders["same"])) == load_tokenizer(folders["same"]).encode(
        "\n", add_special_tokens=False
    )


@pytest.mark.parametrize("name", ["other", "same"])
def test_another_models_own_template_renders_the_text(
    folders: dict[str, str], engine: Any, rollout: Rollout, name: str
) -> None:
    options = {"kind": "model", "path": folders[name], "through_text": True}
    found = make_scorer(folders, {name: options}).score(engine, rollout, LAYOUT)[name]
    ids = render(folders[name], 3)
    assert found.tolist() == pytest.approx(score_plainly(folders[name], ids), abs=1e-5)


def test_the_policys_padding_may_be_no_token_of_the_model(
    folders: dict[str, str], engine: Any, rollout: Rollout
) -> None:
    options = {"kind": "model", "path": folders["other"], "through_text": True}
    scorer = make_scorer(folders, {"other": options})
    beyond = dataclasses.replace(LAYOUT, pad_token_id=1_000_000)
    found = scorer.score(engine, rollout, beyond)["other"]
    torch.testing.assert_close(found, scorer.score(engine, rollout, LAYOUT)["other"])


def test_scores_do_not_hang_on_the_rows(
    folders: dict[str, str], engine: Any, rollout: Rollout
) -> None:
    scorer = make_scorer(folders, {"same": {"kind": "model", "path": folders["same"]}})
    one = scorer.score(engine, rollout, LAYOUT)["same"]
    unpacked = Layout(max_length=1, micro_batch_size=1, packing=False, pad_token_id=0)
    torch.testing.assert_close(
        scorer.score(engine, rollout, unpacked)["same"], one, atol=1e-5, rtol=0
    )


def test_rewards_are_normalised_weighted_and_summed(
    folders: dict[str, str], engine: Any, rollout: Rollout
) -> None:
    model = {"kind": "model", "path": folders["same"]}
    plain = make_scorer(folders, {"same": model}).score(engine, rollout, LAYOUT)["same"]
    section = {
        "same": {**model, "normalize": True, "weight": 3.0},
        "exact": {"weight": -1.0},
        "length": {"low": 1, "high": 6},
    }
    scorer = make_scorer(folders, section)
    scores = scorer.score(engine, rollout, LAYOUT)
    torch.testing.assert_close(scores["same"], (plain - 0.5) / 2.0)
    assert scores["exact"].tolist() == [1.0, 1.0, 1.0]
    assert scores["length"].tolist() == [1.0, 1.0, 6 / 19]
    wanted = 3.0 * scores["same"] - 1.0 + scores["length"]
    torch.testing.assert_close(scorer.total(scores), wanted)
    assert scorer.texts(rollout) == [answer for _, answer in TALKS]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "other",
            {},
            r"another tokenizer \(\d+ tokens, .*another chat template .*through_text=true",
        ),
        ("template", {}, "has another chat template than the policy"),
        ("other", {"through_text": True, "normalize": True}, "needs reward_mean and reward_std"),
    ],
)
def test_models_that_would_misread_are_refused(
    folders: dict[str, str], name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_scorer(folders, {name: {"kind": "model", "path": folders[name], **options}})


def test_text_needs_a_template(folders: dict[str, str], tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer()
    folder = Path(make_folder(tmp_path / "bare", tokenizer, "plain"))
    (folder / "chat_template.jinja").unlink()
    options = {"kind": "model", "path": str(folder)}
    with pytest.raises(ConfigError, match="needs a chat template"):
        make_scorer(folders, {"bare": {**options, "through_text": True}})
    with pytest.raises(ConfigError, match=r"chat template \(it has none\)"):
        make_scorer(folders, {"bare": options})


def test_responses_beyond_the_models_positions_are_named(
    folders: dict[str, str], engine: Any, rollout: Rollout
) -> None:
    scorer = make_scorer(folders, {"short": {"kind": "model", "path": folders["short"]}})
    with pytest.raises(DataError, match=r"stage.rewards.short: .* has 20 positions"):
        scorer.score(engine, rollout, LAYOUT)


def test_a_model_that_returns_nan_is_named(folders: dict[str, str], rollout: Rollout) -> None:
    engine: Any = FakeEngine({"same": folders["same"]})
    with torch.no_grad():
        engine.models["reward:same"].decoder.score.weight.fill_(float("nan"))
    scorer = make_scorer(folders, {"same": {"kind": "model", "path": folders["same"]}})
    with pytest.raises(NumericsError, match=r"stage.rewards.same: .* returned nan for the prompt"):
        scorer.score(engine, rollout, LAYOUT)


class PlaceOnly:
    """As much of an engine as a rule needs."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size


def test_a_rule_judges_each_sample_on_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that answers otherwise at every call must not divide the ranks."""
    judged: list[str] = []

    def fickle(prompt: str, response: str, answer: str | None) -> float:
        judged.append(response)
        return float(len(judged))

    reward = RuleReward("fickle", "python", fickle, {})
    texts, parts = list("abcdefg"), []
    monkeypatch.setattr(scoring, "sum_tensor", lambda own: parts.append(own.clone()) or own)
    for rank in range(3):
        engine: Any = PlaceOnly(rank, 3)
        scoring.judge_once(reward, engine, ["?"] * 7, texts, [None] * 7)
    assert sorted(judged) == texts
    assert sorted(torch.stack(parts).sum(0).tolist()) == [1, 2, 3, 4, 5, 6, 7]
    lonely: Any = PlaceOnly(5, 8)
    assert scoring.judge_once(reward, lonely, ["?"], ["a"], [None]).tolist() == [0.0]
