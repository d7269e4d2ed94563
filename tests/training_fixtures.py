"""A tokenizer, a prepared store and a tiny model config for training tests."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def english_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a 400-piece BPE tokenizer folder trained on the English samples."""
    import sentencepiece

    from tokenizer.load import save_tokenizer

    lines = (ROOT / "samples/en.jsonl").read_text(encoding="utf-8").splitlines()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(json.loads(line)["text"] for line in lines),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("tokenizer") / "en"
    save_tokenizer(model.getvalue(), folder)
    return folder


@pytest.fixture(scope="session")
def base_config(
    english_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Return a complete config of a seconds-long run with uneven documents, its data prepared."""
    from trainer.config import load_config
    from trainer.data.prepared.prepare import ensure_prepared

    values: dict[str, Any] = {
        "name": "test",
        "run_dir": "to be set",
        "stage": {"name": "pretrain"},
        "model": {
            "name": "micro",
            "architecture": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "tie_word_embeddings": False,
            },
        },
        "tokenizer": {"path": str(english_tokenizer)},
        "data": {
            "sources": {"en": {"paths": [str(ROOT / "samples/en.jsonl")]}},
            "store_dir": str(tmp_path_factory.mktemp("store")),
            "max_length": 96,
            "num_processes": 1,
            "holdout_share": 0.05,
        },
        "engine": {"zero_stage": 0, "precision": "fp32"},
        "optim": {"lr": 1e-3},
        "schedule": {"name": "cosine", "warmup_steps": 2},
        "peft": {},
        "loop": {
            "max_steps": 5,
            "micro_batch_size": 2,
            "global_batch_tokens": 96 * 8,
            "eval_chars": 0,
            "keep_last": 9,
        },
        "log": {},
        "cluster": {},
    }
    config = load_config(values)
    ensure_prepared(config.data, str(english_tokenizer))
    return values


@pytest.fixture(scope="session")
def chat_config(
    base_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Return a complete config of stage sft on short conversations of uneven weight, prepared."""
    from trainer.config import load_config
    from trainer.data.prepared.prepare import ensure_prepared

    folder = tmp_path_factory.mktemp("chat")
    lines = [json.dumps({"messages": messages}) + "\n" for messages in make_conversations(120)]
    (folder / "chat.jsonl").write_text("".join(lines))
    values = copy.deepcopy(base_config)
    values["stage"] = {"name": "sft", "sample_tokens": 0}
    values["data"] |= {
        "sources": {"chat": {"paths": [str(folder / "chat.jsonl")]}},
        "store_dir": str(folder / "store"),
        "content": "conversations",
        "weights_are": "epochs",
        "template": "plain",
        "max_bad_row_share": 0.0,
    }
    config = load_config(values)
    ensure_prepared(config.data, str(config.tokenizer.path))
    return values


@pytest.fixture(scope="session")
def preference_config(
    base_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Return a complete config of stage reward on short pairs with margins, prepared."""
    from trainer.config import load_config
    from trainer.data.prepared.prepare import ensure_prepared

    folder = tmp_path_factory.mktemp("preferences")
    lines = [json.dumps(row) + "\n" for row in make_pairs(120)]
    (folder / "pairs.jsonl").write_text("".join(lines))
    values = copy.deepcopy(base_config)
    values["stage"] = {"name": "reward"}
    values["data"] |= {
        "sources": {"pairs": {"paths": [str(folder / "pairs.jsonl")]}},
        "store_dir": str(folder / "store"),
        "content": "preferences",
        "weights_are": "epochs",
        "template": "plain",
        "max_bad_row_share": 0.0,
        "holdout_share": 0.2,
    }
    config = load_config(values)
    ensure_prepared(config.data, str(config.tokenizer.path))
    return values


@pytest.fixture(scope="session")
def dpo_config(
    preference_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Return a complete config of stage dpo on the same pairs, from a random model's folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = copy.deepcopy(preference_config)
    folder = tmp_path_factory.mktemp("start") / "model"
    architecture = values["model"]["architecture"]
    config = AutoConfig.for_model(**architecture, vocab_size=448, initializer_range=0.15)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    values["model"] = {"name": "start", "path": str(folder)}
    objective = {"name": "sigmoid", "beta": 0.5}
    values["stage"] = {"name": "dpo", "sample_tokens": 0, "objective": objective}
    return values


def make_pairs(num: int) -> list[dict[str, Any]]:
    """Return pairs whose chosen answer ends with other words than the rejected one."""
    random = Random(0)
    words = ["the", "wind", "from", "north", "is", "cold", "over", "harbour", "boats", "wait"]
    pairs = []
    for number in range(num):
        question = " ".join(random.choices(words, k=random.randint(1, 4)))
        first, second = (" ".join(random.choices(words, k=random.randint(1, 5))) for _ in range(2))
        pairs.append(
            {
                "prompt": f"{number} {question}?",
                "chosen": f"{first} with thanks",
                "rejected": f"{second} {random.choice(['never', 'go away'])}",
                "margin": round(random.random(), 2),
            }
        )
    return pairs


def make_conversations(num: int) -> list[list[dict[str, Any]]]:
    """Return conversations of one to three turns; second answers count half, some twice."""
    random = Random(0)
    words = ["the", "wind", "from", "north", "is", "cold", "over", "harbour", "boats", "wait"]
    conversations = []
    for number in range(num):
        messages: list[dict[str, Any]] = []
        for turn in range(random.choice([1, 1, 2, 3])):
            question = " ".join(random.choices(words, k=random.randint(1, 4)))
            answer = " ".join(random.choices(words, k=random.randint(1, 6)))
            weight = 0.5 if turn == 1 else 2.0 if number % 5 == 0 else 1.0
            messages.append({"role": "user", "content": f"{number} {question}?"})
            messages.append({"role": "assistant", "content": answer, "loss_weight": weight})
        conversations.append(messages)
    return conversations


@pytest.fixture
def vary(base_config: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """Return a function that copies the base config with dotted keys changed."""
    return varying(base_config)


@pytest.fixture
def vary_chat(chat_config: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """Return a function that copies the config of stage sft with dotted keys changed."""
    return varying(chat_config)


@pytest.fixture
def vary_preferences(preference_config: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """Return a function that copies the config of stage reward with dotted keys changed."""
    return varying(preference_config)


@pytest.fixture
def vary_dpo(dpo_config: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """Return a function that copies the config of stage dpo with dotted keys changed."""
    return varying(dpo_config)


def write_mixture(
    values: dict[str, Any], folder: Path, parts: Mapping[str, tuple[list[str], float]]
) -> None:
    """Give a config weighted sources of these lines in the place of its own, and prepare them."""
    from trainer.config import load_config
    from trainer.data.prepared.prepare import ensure_prepared

    values["data"] |= {"sources": {}, "store_dir": str(folder / "store")}
    for name, (lines, weight) in parts.items():
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8")
        values["data"]["sources"][name] = {"paths": [str(path)], "weight": weight}
    config = load_config(values)
    ensure_prepared(config.data, str(config.tokenizer.path))


def varying(base: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """Return a function that copies ``base`` with dotted keys changed."""

    def change(run_dir: Path, **changes: Any) -> dict[str, Any]:
        values = copy.deepcopy(base)
        values["run_dir"] = str(run_dir)
        for key, value in changes.items():
            section, _, name = key.partition("__")
            values[section][name] = value
        return values

    return change
