"""The prompts of each step, and how many steps a pass over them takes."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

from trainer.config import load_config
from trainer.data.prepared.prepare import ensure_prepared, open_store
from trainer.length import count_steps
from trainer.rollout.prompts import PromptLoader


def test_a_pass_takes_each_prompt_once(base_config: dict[str, Any], tmp_path: Path) -> None:
    """Many prompts fit into one row of tokens, but a step counts prompts."""
    rows = [{"prompt": f"What is {n}?", "response": str(n)} for n in range(12)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = copy.deepcopy(base_config)
    values["data"] |= {
        "sources": {"own": {"paths": [str(tmp_path / "own.jsonl")]}},
        "store_dir": str(tmp_path / "store"),
        "content": "prompts",
        "template": "plain",
        "packing": True,
        "holdout_share": 0.0,
        "weights_are": "epochs",
    }
    config = load_config(values)
    path = str(config.tokenizer.path)
    ensure_prepared(config.data, path)
    store = open_store(config.data, path)
    config = dataclasses.replace(
        config, loop=dataclasses.replace(config.loop, epochs=2, max_steps=0)
    )
    settled, _ = count_steps(config, store, 4)
    assert settled.loop.max_steps == 2 * 12 // 4
    loader = PromptLoader(store, config.data, 0, 4, 0)
    steps = iter(loader)
    for _ in range(2):
        answers = [prompt.answer for _ in range(3) for prompt in next(steps)]
        assert sorted(answers, key=int) == [str(n) for n in range(12)]
    assert loader.epochs() == {"own": 2.0}
