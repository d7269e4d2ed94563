"""The parts of one engine's module: each loaded, tuned or frozen as the config's groups say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import PretrainedConfig

from tokenizer.load import num_ids
from trainer.config import ModelConfig, PeftConfig, grad_accum_steps
from trainer.engine.collectives import barrier
from trainer.engine.ds_config import ModelSize, make_ds_config
from trainer.engine.engine import Engine, choose_precision, partitioning, prepare_ops
from trainer.engine.precision import DTYPES
from trainer.errors import ConfigError
from trainer.models.actor_critic import CRITIC, REFERENCE, without_dropout
from trainer.models.adapter_files import FOLDER
from trainer.models.adapter_switch import AdapterSwitch
from trainer.models.adapters import (
    add_adapter,
    apply_peft,
    keep_adapter_config,
    learning_rate_factors,
)
from trainer.models.filling import Fill, fill_plain, return_freed_memory
from trainer.models.head import install_fused_head, supports_fused_head
from trainer.models.language_model import LanguageModel
from trainer.models.load import load_model, make_config, special_ids
from trainer.models.quantize import require_bitsandbytes
from trainer.models.scalar_model import (
    SCALAR,
    ScalarModel,
    ScoreHead,
    install_score_head,
    made_head,
    new_value_head,
    scalar_config,
)
from trainer.stage import Context

T = TypeVar("T")
ACTOR_PART = "actor."  # in the names of the actor's parameters
CRITIC_PART = f"{CRITIC}."  # in the names of the critic's parameters, also of a shared backbone


class Parts:
    """Loads the models of one engine: precision, DeepSpeed's config and tuning are the same.

    Args:
        context: config and place of the run.
        tokenizer: the run's.
    """

    def __init__(self, context: Context, tokenizer: Any) -> None:
        self._context, self._config = context, context.config
        self._num_tokens, self._special = num_ids(tokenizer), special_ids(tokenizer)
        prepare_ops(self._config.engine, context.local_rank)
        self._precision = choose_precision(self._config.engine.precision)
        self._peft = self._config.peft
        self._quantization = self._peft.quantization if self._peft.mode == "qlora" else None
        if self._quantization:
            require_bitsandbytes()

    @property
    def adapters_suffice(self) -> bool:
        """Whether the start model can be had from the trained one by switching adapters."""
        return self._peft.mode in ("lora", "qlora") and not self._peft.train_embeddings

    @property
    def reference_adapter(self) -> str | None:
        """The adapter that is the reference: a frozen copy of the continued one, or none."""
        return REFERENCE if self._peft.adapter else None

    def check_shared(self, critic_path: str | None) -> None:
        """Refuse what one frozen backbone cannot serve.

        Raises:
            ConfigError: the backbone is trained, or the critic has weights of its own.
        """
        if not self.adapters_suffice:
            raise ConfigError(
                f"shared: actor and critic share one frozen backbone, but peft.mode="
                f"{self._peft.mode} peft.train_embeddings={self._peft.train_embeddings} trains it; "
                "use peft=lora or qlora without train_embeddings, or a critic of its own"
            )
        if critic_path:
            raise ConfigError(
                f"shared: the critic shares the policy's backbone and cannot start from "
                f"{critic_path}; leave it out, or give it a backbone of its own"
            )

    def language_config(self, model: ModelConfig) -> PretrainedConfig:
        """Return the transformers config of a causal language model."""
        make = partial(make_config, model, self._num_tokens, self._special)
        return _in_turn(self._context, make)

    def scalar_config(self, model: ModelConfig) -> PretrainedConfig:
        """Return the transformers config of a one-label classifier."""
        make = partial(scalar_config, model, self._num_tokens, self._special)
        return _in_turn(self._context, make)

    def settle(self, sizes: list[tuple[int, int]]) -> None:
        """Decide DeepSpeed's config.

        Args:
            sizes: (all parameters, elements of the largest) of each model.
        """
        config, world_size = self._config, self._context.world_size
        self._ds_config = make_ds_config(
            config.engine,
            precision=self._precision,
            micro_batch_size=config.loop.micro_batch_size,
            grad_accum_steps=grad_accum_steps(config, world_size),
            grad_clip=config.optim.grad_clip,
            size=ModelSize(sum(size for size, _ in sizes), max(largest for _, largest in sizes)),
            world_size=world_size,
            on_cuda=torch.cuda.is_available(),
        )
        self._split = partitioning(self._ds_config)

    def load_policy(self, config: PretrainedConfig) -> LanguageModel:
        """Load the causal language model that is trained."""
        return LanguageModel(self._train(self._load_language(config)), self._num_tokens)

    def load_scalar(self, model: ModelConfig, config: PretrainedConfig) -> ScalarModel:
        """Load the classifier that is trained; a head that it lacks starts small."""
        return ScalarModel(self._train(self._load_scalar(model, config)))

    def load_actor(
        self, config: PretrainedConfig, *, switched: bool
    ) -> tuple[LanguageModel, AdapterSwitch | None]:
        """Load the policy of a preference stage, without dropout.

        Args:
            config: of the policy; its dropout is set to 0.
            switched: whether its adapters are to be switched, for the reference.
        """
        peft = dataclasses.replace(self._peft, dropout=0.0)
        adapted = self._tune(self._load_language(without_dropout(config)), peft)
        self._keep_settings(adapted)
        switch = None
        if switched:
            if self.reference_adapter:
                add_adapter(adapted, peft, REFERENCE, trained=False, fill=self._fill)
            switch = AdapterSwitch(adapted)
        self._save_activations(adapted, switch)
        return LanguageModel(adapted, self._num_tokens), switch

    def load_reference(self, config: PretrainedConfig) -> LanguageModel:
        """Load a frozen copy of the policy's start."""
        model = self._load_language(without_dropout(config))
        if self._peft.adapter:
            model = self._tune(model, dataclasses.replace(self._peft, dropout=0.0))
        return LanguageModel(model.requires_grad_(False), self._num_tokens)

    def load_critic(
        self, model: ModelConfig, config: PretrainedConfig, *, own: bool
    ) -> ScalarModel:
        """Load a critic with a backbone of its own.

        Args:
            model: what it starts from.
            config: of it; its dropout is set to 0.
            own: whether that is another model than the policy, whose adapter it then cannot have.
        """
        peft = dataclasses.replace(self._peft, dropout=0.0)
        if own:
            peft = dataclasses.replace(peft, adapter=None)
        classifier = self._load_scalar(model, without_dropout(config), zero=True)
        adapted = self._tune(classifier, peft, model.path, self._config.loop.seed + 1)
        self._save_activations(adapted)
        return ScalarModel(adapted)

    def load_judge(self, model: ModelConfig, config: PretrainedConfig) -> ScalarModel:
        """Load a frozen reward model.

        Raises:
            ConfigError: it is no reward model: its head would be random.
        """
        if made_head(model, config, 0):
            raise ConfigError(
                f"rewards.{model.name}: {model.path} is a language model without a trained score "
                "head; give an exported reward model"
            )
        return ScalarModel(self._load_scalar(model, without_dropout(config)).requires_grad_(False))

    def share_backbone(self, adapted: Any, config: PretrainedConfig) -> ScoreHead:
        """Give the actor's backbone an adapter for the critic.

        Args:
            adapted: the actor's model, wrapped by peft.
            config: of the critic.

        Returns:
            The critic's head.
        """
        peft = dataclasses.replace(self._peft, dropout=0.0)
        torch.manual_seed(self._config.loop.seed + 1)
        with self._gathering():
            add_adapter(adapted, peft, CRITIC, trained=True, fill=self._fill)
        return new_value_head(config, DTYPES[self._precision])

    def engine(
        self, module: torch.nn.Module, name_of: Callable[[str], str], critic_lr_ratio: float = 1.0
    ) -> Engine:
        """Put a module into the engine.

        Args:
            module: of the loaded parts.
            name_of: from a parameter's name to that in checkpoints.
            critic_lr_ratio: the critic's learning rate over the others'.
        """
        factors = learning_rate_factors(self._peft) | {CRITIC_PART: critic_lr_ratio}
        return Engine(
            module,
            self._config.engine,
            self._config.optim,
            self._ds_config,
            self._precision,
            name_of,
            factors,
            (ACTOR_PART, CRITIC_PART),
        )

    @property
    def _fill(self) -> Fill:
        return self._split.fill if self._split else fill_plain

    def _gathering(self) -> AbstractContextManager[None]:
        """Let peft gather what DoRA starts from, where transformers is said to split models."""
        return self._split.transformers_loading() if self._split else nullcontext()

    def _load_language(self, config: PretrainedConfig) -> Any:
        """Load the model group's causal language model, its head fused where that is possible."""
        model = self._load(self._config.model, config)
        if supports_fused_head(model):
            install_fused_head(model, self._num_tokens)
        return model

    def _load_scalar(
        self, model: ModelConfig, config: PretrainedConfig, *, zero: bool = False
    ) -> Any:
        """Load a classifier, with a new head where the model brings none."""
        made = made_head(model, config, self._config.loop.seed, zero=zero)
        loaded = self._load(model, config, auto=SCALAR, made=made)
        install_score_head(loaded)
        return loaded

    def _load(self, model: ModelConfig, config: PretrainedConfig, **kind: Any) -> Any:
        dtype, seed = DTYPES[self._precision], self._config.loop.seed
        return load_model(model, config, dtype, seed, self._split, self._quantization, **kind)

    def _train(self, model: Any) -> Any:
        """Tune the model group's only model."""
        adapted = self._tune(model, self._peft)
        self._keep_settings(adapted)
        self._save_activations(adapted)
        return adapted

    def _tune(
        self, model: Any, peft: PeftConfig, base: str | None = None, seed: int | None = None
    ) -> Any:
        """Set what is trained; new adapters start equal on every rank."""
        torch.manual_seed(self._config.loop.seed if seed is None else seed)
        with self._gathering():
            adapted = apply_peft(model, peft, base or self._config.model.path, self._fill)
        if self._quantization is not None:
            return_freed_memory()  # peft looks at every weight, which computes it
        return adapted

    def _keep_settings(self, adapted: Any) -> None:
        """Write what exports of an adapter need into the run."""
        if self._peft.mode in ("lora", "qlora") and self._context.rank == 0:
            folder = self._context.run_dir / FOLDER
            keep_adapter_config(adapted, folder, str(self._config.model.path))

    def _save_activations(self, adapted: Any, switch: AdapterSwitch | None = None) -> None:
        """Compute activations again in backward, if the engine group says so."""
        if self._config.engine.activation_checkpointing:
            options: dict[str, Any] = {"use_reentrant": False}
            if switch is not None:
                options["context_fn"] = switch.checkpoint_contexts
            adapted.gradient_checkpointing_enable(options)
            adapted.enable_input_require_grads()


def _in_turn(context: Context, work: Callable[[], T]) -> T:
    """Do ``work`` on rank 0 first: transformers copies a model's own code into a shared folder."""
    if not context.config.model.trust_remote_code:
        return work()
    done = work() if context.rank == 0 else None
    barrier()
    return work() if done is None else done
