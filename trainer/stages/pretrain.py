"""Continued pretraining: next-token loss on packed documents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from trainer.metrics.sinks import Sinks
from trainer.next_token import NextTokenStage
from trainer.sample_answers import answering_model


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
        if not self.sample_prompts:
            return
        module: Any = self.policy.module
        with answering_model(self.policy, module) as model:
            for prompt in self.sample_prompts:
                ids = self.tokenizer(prompt, return_tensors="pt").input_ids.to(self.policy.device)
                out = model.continue_text(ids, self.sample_tokens, [] if end is None else [end])
                # Decoded together, or the space between prompt and continuation is lost.
                whole = self.tokenizer.decode(out[0], skip_special_tokens=True)
                start = self.tokenizer.decode(ids[0], skip_special_tokens=True)
                sinks.sample(step, prompt, whole.removeprefix(start))
