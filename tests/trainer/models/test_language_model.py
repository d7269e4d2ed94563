"""The model as the engine holds it, asked for samples."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.models.language_model import LanguageModel


def test_samples_end_where_the_learned_positions_do() -> None:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 12, "vocab_size": 20}
    config = AutoConfig.for_model("gpt2", **sizes)
    torch.manual_seed(0)
    model = LanguageModel(AutoModelForCausalLM.from_config(config), 20).eval()
    for length, expected in ((4, 9), (10, 12), (12, 12)):
        prompt = torch.arange(length)[None] % 20
        assert model.continue_text(prompt, 5, []).shape == (1, expected)
