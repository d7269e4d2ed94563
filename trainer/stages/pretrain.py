"""Continued pretraining: next-token loss on packed documents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from trainer.metrics.sinks import Sinks
from trainer.next_token import NextTokenStage


@dataclass
class Pretrain(NextTokenStage):
    """Hyperparameters of the stage; the rest are the config's groups."""

    name: ClassVar[str] = "pretrain"
    content: ClassVar[str] = "documents"

    sample_prompts: list[str] = field(default_factory=list)  # continued greedily at evaluations
    sample_tokens: int = 40  # tokens of each continuation

    def write_samples(self, sinks: Sinks, step: int) -> None:
        """Record how the model continues each prompt."""
        end = self.tokenizer.eos_token_id
        for prompt in self.sample_prompts:
            ids = self.tokenizer(prompt, return_tensors="pt").input_ids.to(self.policy.device)
            model: Any = self.policy.module
            out = model.continue_text(ids, self.sample_tokens, [] if end is None else [end])
            # Decoded together, or the space between prompt and continuation is lost.
            whole = self.tokenizer.decode(out[0], skip_special_tokens=True)
            start = self.tokenizer.decode(ids[0], skip_special_tokens=True)
            sinks.sample(step, prompt, whole.removeprefix(start))
