"""All models of a preference stage in one module, for one engine.

One optimizer, one loss scale and one checkpoint: a gradient that overflows in one part skips the
step of all, and a resumed run finds all parts at the same step. Frozen parts are split and
offloaded like trained ones.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from trainer.models.adapter_switch import AdapterSwitch
from trainer.models.language_model import LanguageModel
from trainer.models.scalar_model import ScalarModel, ScoreHead, score

CRITIC = "critic"  # the critic's adapter on a shared backbone, and its names' start in checkpoints
REFERENCE = "reference"  # the frozen copy of an adapter that is continued
ACTOR_PREFIX = "actor.decoder."
REWARD = "reward:"


class PreferencePolicy(nn.Module):
    """A policy and what it is compared with.

    Args:
        actor: the trained model.
        reference: a frozen copy of the model it starts from; None where an adapter does instead.
        switch: of the actor's adapters, when it has any.
        reference_adapter: the adapter that is the reference; None is the bare backbone.
    """

    def __init__(
        self,
        actor: LanguageModel,
        reference: LanguageModel | None = None,
        switch: AdapterSwitch | None = None,
        reference_adapter: str | None = None,
    ) -> None:
        super().__init__()
        self.actor, self.reference = actor, reference
        self.switch, self.reference_adapter = switch, reference_adapter

    def forward(self, part: str = "actor", **inputs: Any) -> Tensor | tuple[Tensor, ...]:
        """Run one part.

        Args:
            part: ``actor`` or ``reference``, both called like ``LanguageModel``; the reference
                computes no gradient.
            inputs: of that part.

        Raises:
            ValueError: no such part.
        """
        if part == "actor":
            return self.actor(**inputs)
        if part == "reference":
            return self._refer(inputs)
        raise ValueError(f"part={part!r}: there is only actor and reference")

    @torch.no_grad()
    def _refer(self, inputs: dict[str, Any]) -> Tensor | tuple[Tensor, ...]:
        if self.reference is not None:
            return self.reference(**inputs)
        if self.switch is None:
            raise ValueError("part='reference': the policy was built without one (streaming=False)")
        with self.switch.using(self.reference_adapter):
            return self.actor(**inputs)


class ActorCritic(PreferencePolicy):
    """A policy with its critic, its reference and the models that judge its answers.

    Args:
        actor: the trained policy.
        critic: a model of its own, or the head of one that shares the actor's backbone with an
            adapter of its own; None where advantages need none.
        reference: as for ``PreferencePolicy``, like the next two.
        switch: of the actor's adapters.
        reference_adapter: the adapter that is the reference.
        rewards: frozen reward models by name.
    """

    def __init__(
        self,
        actor: LanguageModel,
        critic: ScalarModel | ScoreHead | None,
        reference: LanguageModel | None = None,
        switch: AdapterSwitch | None = None,
        reference_adapter: str | None = None,
        rewards: Mapping[str, ScalarModel] | None = None,
    ) -> None:
        super().__init__(actor, reference, switch, reference_adapter)
        self.critic = critic
        # torch has no names with dots for modules; folders have.
        self._names = {name: f"model_{number}" for number, name in enumerate(rewards or {})}
        self.rewards = nn.ModuleDict(
            {self._names[name]: model for name, model in (rewards or {}).items()}
        )

    def forward(self, part: str = "actor", **inputs: Any) -> Tensor | tuple[Tensor, ...]:
        """Run one part.

        Args:
            part: ``actor`` or ``reference``, called like ``LanguageModel``; ``critic`` or
                ``reward:NAME``, called like ``ScalarModel``. Only actor and critic have gradients.
                ``both`` is called with the actor's inputs and the critic's ``selected``, and
                returns the results of the two: ZeRO-3 and offloaded optimizers lose gradients of
                parameters that some backward of an accumulation window does not reach.
            inputs: of that part.

        Raises:
            ValueError: no such part.
        """
        if part == "both":
            selected = inputs.pop("selected")
            places = {key: inputs[key] for key in ("input_ids", "position_ids")}
            return self.actor(**inputs), self._criticise({**places, "selected": selected})
        if part == CRITIC:
            return self._criticise(inputs)
        if part.startswith(REWARD):
            with torch.no_grad():
                return self._reward_model(part.removeprefix(REWARD))(**inputs)
        return super().forward(part, **inputs)

    def _criticise(self, inputs: dict[str, Any]) -> Tensor | tuple[Tensor, ...]:
        if isinstance(self.critic, ScalarModel):
            return self.critic(**inputs)
        if self.critic is None or self.switch is None:
            raise ValueError("part='critic': built without one (with_critic=False)")
        with self.switch.using(CRITIC):
            return score(self.actor.decoder, self.critic, **inputs)

    def _reward_model(self, name: str) -> nn.Module:
        if name not in self._names:
            raise ValueError(f"part='{REWARD}{name}': reward models are {sorted(self._names)}")
        return self.rewards[self._names[name]]


def checkpoint_name(name: str) -> str:
    """Return a parameter's name in checkpoints: the actor's is that of a plain policy.

    The critic's begin with ``critic.``, whether it has a backbone of its own or an adapter.
    """
    own = name.removeprefix(ACTOR_PREFIX)
    return f"{CRITIC}.{own}" if own != name and f".{CRITIC}." in own else own


def policy_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Return the policy's entries among a checkpoint's shapes by parameter name."""
    return {n: shape for n, shape in shapes.items() if not n.startswith(f"{CRITIC}.")}


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of a model's config in which every dropout is 0.

    A ratio of two probabilities of the same answer would otherwise also measure the dropout.
    """
    words = ("dropout", "pdrop", "layerdrop")
    still = copy.deepcopy(config)
    for key, value in config.to_dict().items():
        if type(value) in (int, float) and any(word in key for word in words):
            setattr(still, key, type(value)(0))
    return still
