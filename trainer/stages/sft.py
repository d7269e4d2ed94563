"""Supervised fine-tuning: next-token loss on the answers of conversations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from tokenizer.load import load_tokenizer
from trainer.config import RunConfig
from trainer.data.batches.collate import Batch
from trainer.data.chats.chat import resolve_template
from trainer.metrics.sinks import Sinks
from trainer.models.noise import EmbeddingNoise
from trainer.next_token import NextTokenStage
from trainer.sample_answers import choose_questions, write_answers
from trainer.stage import Context
from trainer.store_stage import derive_seed

LOW_ADAPTER_LR = 5e-5  # QLoRA took 2e-4 for models of 7 and 13 billion (arXiv:2305.14314)


@dataclass
class Sft(NextTokenStage):
    """Hyperparameters of the stage; the rest are the config's groups."""

    name: ClassVar[str] = "sft"
    content: ClassVar[str] = "conversations"

    sample_prompts: list[str] = field(default_factory=list)  # questions; none = held-out ones
    sample_tokens: int = 128  # tokens of each sampled answer; 0 = no samples
    neftune_alpha: float = 0.0  # noise on the embeddings; 0 = none

    def check(self, config: RunConfig) -> list[str]:
        """Return what is out of range, and what contradicts the model."""
        problems = [
            f"stage.{key}={value}: expected 0 or more"
            for key, value in (
                ("sample_tokens", self.sample_tokens),
                ("neftune_alpha", self.neftune_alpha),
            )
            if value < 0
        ]
        return problems + super().check(config)

    def settle(self, config: RunConfig) -> tuple[RunConfig, list[str]]:
        """Settle the run's length; say when its learning rate is meant for other parameters."""
        config, remarks = super().settle(config)
        if config.peft.mode in ("lora", "qlora") and config.optim.lr < LOW_ADAPTER_LR:
            remarks.append(
                f"optim.lr={config.optim.lr:g} is little for peft.mode={config.peft.mode}: "
                "adapters usually learn with 1e-4 to 3e-4"
            )
        return config, remarks

    def load_tokenizer(self, path: str) -> Any:
        """Return the tokenizer with the chat template that the run teaches."""
        tokenizer = load_tokenizer(path)
        tokenizer.chat_template = resolve_template(tokenizer, self.config.data.template)
        return tokenizer

    def setup(self, context: Context, sinks_step: int) -> Sinks:
        """Set up data and model; put the noise on its embeddings."""
        sinks = super().setup(context, sinks_step)
        self._noise = None
        if self.neftune_alpha:
            model: Any = self.policy.module
            embedding = model.decoder.get_input_embeddings()
            self._noise = EmbeddingNoise(embedding, self.neftune_alpha)
        return sinks

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return the summed loss of the answers, each token's times its weight."""
        if self._noise is not None:
            rows = batch.sample_ids.tolist()
            seeds = [derive_seed(self.config.loop.seed, row) for row in rows]
            self._noise.set_rows(batch.piece_lengths, batch.input_ids.shape[1], seeds)
        return super().loss(batch)

    def write_samples(self, sinks: Sinks, step: int) -> None:
        """Record the model's answers, greedily decoded."""
        questions = choose_questions(self.config, self.tokenizer, self.store, self.sample_prompts)
        model: Any = self.policy.module
        asked = (self.tokenizer, questions, self.sample_tokens)
        write_answers(sinks, step, self.policy, model, *asked)
