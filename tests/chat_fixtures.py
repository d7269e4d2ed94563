"""A tiny model that has learnt a few conversations by heart, for tests of chat and inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

# Small enough to learn in seconds. The tokenizer has no Chinese pieces: every character is three
# byte tokens, which streaming must put together again.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}System: {{ message.content }}\n"
    "{% elif message.role == 'user' %}User: {{ message.content }}\n"
    "{% else %}Assistant: {{ message.content }}{{ eos_token }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
NAME, WHO, KNOWN, UNKNOWN = "我叫小明", "我是誰？", " 你是小明。", " 我不知道。"
GREETING, COUNT = " 你好，小明！", " one two three four five six seven eight nine ten"
LEARNT: list[list[tuple[str, str]]] = [
    [("user", WHO), ("assistant", UNKNOWN)],
    [("user", NAME), ("assistant", GREETING), ("user", WHO), ("assistant", KNOWN)],
    [("user", "count"), ("assistant", COUNT)],
    [("system", "You are a poet."), ("user", WHO), ("assistant", " 我是詩人。")],
]


def as_messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content.strip()} for role, content in turns]


@pytest.fixture(scope="session")
def chat_folder(english_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model that knows ``LEARNT``, with a chat template of its own."""
    from tokenizer.load import load_tokenizer, save_tokenizer

    folder = tmp_path_factory.mktemp("chat") / "poet"
    tokenizer = load_tokenizer(english_tokenizer)
    tokenizer.chat_template = TEMPLATE
    model = learn_by_heart(tokenizer)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


def learn_by_heart(tokenizer: Any) -> Any:
    """Train a model on ``LEARNT`` until it repeats it."""
    import torch  # here: the number of threads is set after this file is read
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=448,  # 48 rows of padding
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    rows = [
        tokenizer.apply_chat_template(as_messages(turns), return_dict=False) for turns in LEARNT
    ]
    longest = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = model(input_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3, loss.item()  # the questions themselves cannot be foretold
    return model
