"""What a prompt was made of is in the store, so that another template can render it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from tokenizer.load import load_tokenizer
from trainer.config import load_config
from trainer.data.chats.templates import resolve_template
from trainer.data.prepared.prepare import ensure_prepared, open_store
from trainer.rollout.prompts import read_prompt

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "二加二？"}, {"role": "assistant", "content": "四"}]},
    {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "who?"},
            {"role": "assistant", "content": "you"},
            {"role": "user", "content": "where?"},
        ]
    },
]


def test_chats_render_to_the_prompts(base_config: dict[str, Any], tmp_path: Path) -> None:
    lines = [json.dumps(row) + "\n" for row in ROWS]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    values = copy.deepcopy(base_config)
    values["data"] |= {
        "sources": {"own": {"paths": [str(tmp_path / "prompts.jsonl")]}},
        "store_dir": str(tmp_path / "store"),
        "content": "prompts",
        "template": "plain",
        "system": "be kind",
        "holdout_share": 0.0,
    }
    config = load_config(values)
    path = str(config.tokenizer.path)
    ensure_prepared(config.data, path)
    tokenizer = load_tokenizer(path)
    template = resolve_template(tokenizer, "plain")
    source = open_store(config.data, path).sources["own"]
    prompts = [read_prompt(source, number) for number in range(2)]
    assert [prompt.answer for prompt in prompts] == ["四", None]
    systems = [prompt.chat["messages"][0]["content"] for prompt in prompts]
    assert systems == ["be kind", "be brief"]
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(
            prompt.chat["messages"],
            tools=prompt.chat["tools"],
            chat_template=template,
            add_generation_prompt=True,
            return_dict=False,
        )
        assert list(prompt.ids) == list(ids)
