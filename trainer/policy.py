"""The trained models of a stage, from the config's groups: loaded, adapted, in one engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizer.load import save_tokenizer, sentencepiece_file
from trainer.config import ModelConfig
from trainer.engine.engine import Engine
from trainer.model_parts import Parts
from trainer.models.actor_critic import CRITIC, ActorCritic, PreferencePolicy, checkpoint_name
from trainer.models.aside import written_aside
from trainer.models.language_model import name_in_decoder
from trainer.models.load import measure
from trainer.models.scalar_model import SCALAR, ScalarModel, ScoreHead
from trainer.stage import Context


def build_policy(context: Context, tokenizer: Any) -> tuple[Engine, dict[str, Any]]:
    """Load or create the model and put it into an engine.

    Args:
        context: config and place of the run.
        tokenizer: the run's tokenizer; its ids are the model's real vocabulary rows.

    Returns:
        The engine, and the transformers config as plain data.
    """
    parts = Parts(context, tokenizer)
    model_config = parts.language_config(context.config.model)
    parts.settle([measure(model_config)])
    model = parts.load_policy(model_config)
    return parts.engine(model.train(), name_in_decoder), model_config.to_dict()


def build_scalar(context: Context, tokenizer: Any) -> tuple[Engine, dict[str, Any]]:
    """Load a model with one output a position, from a language model or a trained one.

    Args:
        context: config and place of the run.
        tokenizer: the run's tokenizer.

    Returns:
        The engine around a ``ScalarModel``, and the transformers config as plain data.
    """
    parts = Parts(context, tokenizer)
    model_config = parts.scalar_config(context.config.model)
    parts.settle([measure(model_config, SCALAR)])
    model = parts.load_scalar(context.config.model, model_config)
    return parts.engine(model.train(), name_in_decoder), model_config.to_dict()


def build_preference_policy(
    context: Context, tokenizer: Any, streaming: bool
) -> tuple[Engine, dict[str, Any]]:
    """Load a policy and, where one is wanted, its reference; dropout is off in both.

    Args:
        context: config and place of the run.
        tokenizer: the run's tokenizer.
        streaming: whether the reference must be computable. New adapters are then switched off for
            it, and for continued ones a frozen copy of them is switched on; otherwise a frozen
            copy of the start model is held beside the policy.

    Returns:
        The engine around a ``PreferencePolicy``, and the transformers config as plain data.
    """
    parts = Parts(context, tokenizer)
    model_config = parts.language_config(context.config.model)
    copied = streaming and not parts.adapters_suffice
    parts.settle([measure(model_config)] * (1 + copied))
    actor, switch = parts.load_actor(model_config, switched=streaming and not copied)
    reference = parts.load_reference(model_config) if copied else None
    module = PreferencePolicy(actor, reference, switch, parts.reference_adapter)
    return parts.engine(module.train(), checkpoint_name), model_config.to_dict()


def build_actor_critic(
    context: Context,
    tokenizer: Any,
    *,
    shared: bool = False,
    with_critic: bool = True,
    critic_path: str | None = None,
    rewards: Mapping[str, str] = MappingProxyType({}),
    critic_lr_ratio: float = 1.0,
) -> tuple[Engine, dict[str, Any]]:
    """Load all models of PPO into one engine; dropout is off in all.

    Each is loaded by itself, split as it is read under ZeRO-3. Without ``critic_path`` the critic
    starts from the policy's weights. The value head starts at 0 where the critic brings none.

    Args:
        context: config and place of the run.
        tokenizer: the run's tokenizer.
        shared: whether the critic is an adapter of its own on the actor's frozen backbone; if not,
            it has a backbone of its own, tuned as the peft group says like the actor.
        with_critic: false for advantages that need none.
        critic_path: folder of a reward model that the critic starts from, unless it is shared.
        rewards: folders of frozen reward models by name.
        critic_lr_ratio: the critic's learning rate over the actor's.

    Returns:
        The engine around an ``ActorCritic``, and the transformers config of the actor.

    Raises:
        ConfigError: a plan that the peft group does not allow, or models that do not fit it.
    """
    parts = Parts(context, tokenizer)
    if shared:
        parts.check_shared(critic_path)
    model = context.config.model
    start = ModelConfig(name=CRITIC, path=critic_path) if critic_path else model
    judges = {name: ModelConfig(name=name, path=path) for name, path in rewards.items()}
    model_config = parts.language_config(model)
    critic_config = parts.scalar_config(start) if with_critic else None
    judge_configs = {name: parts.scalar_config(judge) for name, judge in judges.items()}
    copied = not parts.adapters_suffice
    sizes = [measure(model_config)] * (1 + copied)
    if critic_config is not None and not shared:
        sizes.append(measure(critic_config, SCALAR))
    sizes += [measure(config, SCALAR) for config in judge_configs.values()]
    parts.settle(sizes)

    actor, switch = parts.load_actor(model_config, switched=not copied)
    backbone = actor.decoder if shared else None
    critic = _make_critic(parts, start, critic_config, backbone, own=critic_path is not None)
    module = ActorCritic(
        actor,
        critic,
        parts.load_reference(model_config) if copied else None,
        switch,
        parts.reference_adapter,
        {name: parts.load_judge(judges[name], c) for name, c in judge_configs.items()},
    )
    engine = parts.engine(module.train(), checkpoint_name, critic_lr_ratio)
    return engine, model_config.to_dict()


def _make_critic(
    parts: Parts, start: ModelConfig, config: Any, backbone: Any, own: bool
) -> ScalarModel | ScoreHead | None:
    """Return the critic: on the actor's ``backbone``, or on one of its own; None without one."""
    if config is None:
        return None
    if backbone is not None:
        return parts.share_backbone(backbone, config)
    return parts.load_critic(start, config, own=own)


def keep_tokenizer(tokenizer: Any, path: Path, folder: Path) -> None:
    """Copy the tokenizer at ``path`` into the run, which is then exported without its inputs."""
    if folder.exists():
        return
    model_file = sentencepiece_file(path)
    with written_aside(folder) as aside:
        save_tokenizer(tokenizer, aside, model_file.read_bytes() if model_file else None)
