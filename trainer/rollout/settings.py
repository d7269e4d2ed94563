"""The hyperparameters of PPO, GRPO and RLOO, and which of them do not go together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.config import RunConfig
from trainer.errors import ConfigError
from trainer.models.architecture import read_architecture
from trainer.plan.architectures import read_size
from trainer.rollout.experience import Advantage, KlConfig, ScoreConfig
from trainer.rollout.rewards import reward_problems
from trainer.rollout.sampling import Sampling
from trainer.rollout.update import UpdateConfig


@dataclass
class PpoSettings:
    """Fields of the stage."""

    rewards: dict[str, dict[str, Any]] = field(default_factory=dict)
    models: Literal["separate", "shared"] = "separate"  # backbones of actor and critic
    critic: str | None = None  # reward model that the critic starts from; null = the policy
    critic_lr_ratio: float = 1.0  # the critic's learning rate over the policy's
    advantage: Advantage = "gae"
    rollouts_per_step: int = 64  # prompts over all ranks
    responses_per_prompt: int = 1
    gamma: float = 1.0
    lam: float = 0.95
    sampling: Sampling = field(default_factory=Sampling)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    kl: KlConfig = field(default_factory=KlConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)

    @property
    def has_critic(self) -> bool:
        """Whether advantages come from a critic."""
        return self.advantage == "gae"

    def problems(self, config: RunConfig) -> list[str]:
        """Return what is out of range, and what contradicts itself or ``config``."""
        problems = reward_problems(self.rewards)
        for key in ("sampling", "score", "kl", "update"):
            problems += [f"stage.{key}.{problem}" for problem in getattr(self, key).problems()]
        rules = [
            (self.rollouts_per_step >= 1, "rollouts_per_step", "1 or more"),
            (self.responses_per_prompt >= 1, "responses_per_prompt", "1 or more"),
            (0 < self.gamma <= 1, "gamma", "more than 0, at most 1"),
            (0 <= self.lam <= 1, "lam", "0 to 1"),
            (self.critic_lr_ratio > 0, "critic_lr_ratio", "more than 0"),
        ]
        problems += [
            f"stage.{key}={getattr(self, key)!r}: expected {expected}"
            for good, key, expected in rules
            if not good
        ]
        return problems + self._contradictions(config)

    def _contradictions(self, config: RunConfig) -> list[str]:
        """Return which fields do not go together."""
        num_samples = self.rollouts_per_step * self.responses_per_prompt
        longest = config.data.max_length + self.sampling.max_new_tokens
        rules = [
            (
                not self.rewards,
                "stage.rewards is empty, so that there is nothing to learn; name a reward model or "
                "a rule, for example '+stage.rewards.length={low: 20, high: 60}'",
            ),
            (
                self.critic is not None and (self.models == "shared" or not self.has_critic),
                f"stage.critic={self.critic} is a model for a critic of its own, but stage.models="
                f"{self.models} and stage.advantage={self.advantage}; leave it out",
            ),
            (
                not self.has_critic and self.responses_per_prompt < 2,
                f"stage.advantage={self.advantage} compares the responses to a prompt with each "
                "other; set stage.responses_per_prompt to 2 or more, or stage.advantage=gae",
            ),
            (
                not self.sampling.temperature,
                "stage.sampling.temperature=0 is greedy: it tries nothing it could learn from; "
                "use 1",
            ),
            (
                num_samples < self.update.num_minibatches,
                f"stage.update.num_minibatches={self.update.num_minibatches} is more than the "
                f"{num_samples} responses of a step",
            ),
            (
                bool(self.update.critic_warmup_steps) and not self.has_critic,
                f"stage.update.critic_warmup_steps needs a critic, but stage.advantage="
                f"{self.advantage} has none; use 0",
            ),
            (
                self.models == "shared" and config.peft.mode not in ("lora", "qlora"),
                f"stage.models=shared is one frozen backbone with an adapter each for actor and "
                f"critic, but peft.mode={config.peft.mode}; use peft=lora or peft=qlora",
            ),
            (
                config.data.packing and not config.data.isolate_documents,
                "data.isolate_documents=false lets the responses of a row see each other; use "
                "true, or data.packing=false",
            ),
        ]
        problems = [message for wrong, message in rules if wrong]
        try:
            positions = read_size(read_architecture(config.model), "max_position_embeddings")
        except ConfigError:
            return problems  # what every stage checks has said it
        if positions and longest > positions >= config.data.max_length:
            problems.append(
                f"data.max_length={config.data.max_length} (the longest prompt) and "
                f"stage.sampling.max_new_tokens={self.sampling.max_new_tokens} are {longest} "
                f"tokens together, more than the model's max_position_embeddings={positions}; "
                "lower one of the two"
            )
        return problems
