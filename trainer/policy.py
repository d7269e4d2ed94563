"""The trained model of a stage, from the config's groups: loaded, adapted, in its engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PretrainedConfig

from tokenizer.load import num_ids, save_tokenizer, sentencepiece_file
from trainer.config import ModelConfig, grad_accum_steps
from trainer.engine.collectives import barrier
from trainer.engine.ds_config import ModelSize, make_ds_config
from trainer.engine.engine import DTYPES, Engine, choose_precision, partitioning, prepare_ops
from trainer.models.adapter_files import FOLDER
from trainer.models.adapters import (
    apply_peft,
    keep_adapter_config,
    learning_rate_factors,
)
from trainer.models.aside import written_aside
from trainer.models.filling import fill_plain, return_freed_memory
from trainer.models.head import install_fused_head, supports_fused_head
from trainer.models.language_model import PREFIX, LanguageModel
from trainer.models.load import (
    load_model,
    make_config,
    measure,
    special_ids,
)
from trainer.models.quantize import require_bitsandbytes
from trainer.models.scalar_model import (
    SCALAR,
    ScalarModel,
    install_score_head,
    made_head,
    scalar_config,
)
from trainer.stage import Context

T = TypeVar("T")


def build_policy(context: Context, tokenizer: Any) -> tuple[Engine, dict[str, Any]]:
    """Load or create the model and put it into an engine.

    Args:
        context: config and place of the run.
        tokenizer: the run's tokenizer; its ids are the model's real vocabulary rows.

    Returns:
        The engine, and the transformers config as plain data.
    """
    plan = _Plan(context, tokenizer)
    model_config = plan.language_config(context.config.model)
    plan.settle([measure(model_config)])
    model = LanguageModel(plan.load_language(model_config), num_ids(tokenizer)).train()
    return plan.engine(model, PREFIX), model_config.to_dict()


def build_scalar(context: Context, tokenizer: Any) -> tuple[Engine, dict[str, Any]]:
    """Load a model with one output a position, from a language model or a trained one.

    Args:
        context: config and place of the run.
        tokenizer: the run's tokenizer.

    Returns:
        The engine around a ``ScalarModel``, and the transformers config as plain data.
    """
    plan = _Plan(context, tokenizer)
    model_config = plan.scalar_config(context.config.model)
    plan.settle([measure(model_config, SCALAR)])
    model = ScalarModel(plan.load_scalar(model_config)).train()
    return plan.engine(model, PREFIX), model_config.to_dict()


class _Plan:
    """What all models of one engine share: precision, DeepSpeed's config, the way of loading.

    Args:
        context: config and place of the run.
        tokenizer: the run's.
    """

    def __init__(self, context: Context, tokenizer: Any) -> None:
        self.context, self.config = context, context.config
        self._num_tokens, self._special = num_ids(tokenizer), special_ids(tokenizer)
        prepare_ops(self.config.engine, context.local_rank)
        self._precision = choose_precision(self.config.engine.precision)
        peft = self.config.peft
        self._quantization = peft.quantization if peft.mode == "qlora" else None
        if self._quantization:
            require_bitsandbytes()

    def language_config(self, model: ModelConfig) -> PretrainedConfig:
        """Return the transformers config of a causal language model."""
        make = partial(make_config, model, self._num_tokens, self._special)
        return _in_turn(self.context, make)

    def scalar_config(self, model: ModelConfig) -> PretrainedConfig:
        """Return the transformers config of a one-label classifier."""
        make = partial(scalar_config, model, self._num_tokens, self._special)
        return _in_turn(self.context, make)

    def settle(self, sizes: list[tuple[int, int]]) -> None:
        """Decide DeepSpeed's config from (all parameters, largest) of each model."""
        config, world_size = self.config, self.context.world_size
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

    def load_language(self, model_config: PretrainedConfig) -> Any:
        """Load the causal language model with its head fused and what is trained of it set."""
        model = self._load(self.config.model, model_config)
        if supports_fused_head(model):
            install_fused_head(model, self._num_tokens)
        return self._adapt(model)

    def load_scalar(self, model_config: PretrainedConfig) -> Any:
        """Load the classifier, with a new head where the model brings none."""
        made = made_head(self.config.model, model_config, self.config.loop.seed)
        model = self._load(self.config.model, model_config, auto=SCALAR, made=made)
        install_score_head(model)
        return self._adapt(model)

    def _load(self, model: ModelConfig, model_config: PretrainedConfig, **kind: Any) -> Any:
        return load_model(
            model,
            model_config,
            DTYPES[self._precision],
            self.config.loop.seed,
            self._split,
            self._quantization,
            **kind,
        )

    def _adapt(self, model: Any) -> Any:
        """Set what is trained, keep the adapter's settings in the run."""
        config, split = self.config, self._split
        torch.manual_seed(config.loop.seed)  # adapters start equal on every rank
        # Where transformers is said to split models, peft gathers what DoRA starts from.
        with split.transformers_loading() if split else nullcontext():
            fill = split.fill if split else fill_plain
            adapted = apply_peft(model, config.peft, config.model.path, fill)
        if self._quantization is not None:
            return_freed_memory()  # peft looks at every weight, which computes it
        if adapted is not model and self.context.rank == 0:
            keep_adapter_config(adapted, self.context.run_dir / FOLDER, str(config.model.path))
        if config.engine.activation_checkpointing:
            adapted.gradient_checkpointing_enable({"use_reentrant": False})
            adapted.enable_input_require_grads()
        return adapted

    def engine(self, module: torch.nn.Module, prefix: str) -> Engine:
        """Put a module into the engine."""
        config = self.config
        factors = learning_rate_factors(config.peft)
        return Engine(
            module, config.engine, config.optim, self._ds_config, self._precision, prefix, factors
        )


def _in_turn(context: Context, work: Callable[[], T]) -> T:
    """Do ``work`` on rank 0 first: transformers copies a model's own code into a shared folder."""
    if not context.config.model.trust_remote_code:
        return work()
    done = work() if context.rank == 0 else None
    barrier()
    return work() if done is None else done


def keep_tokenizer(tokenizer: Any, path: Path, folder: Path) -> None:
    """Copy the tokenizer at ``path`` into the run, which is then exported without its inputs."""
    if folder.exists():
        return
    model_file = sentencepiece_file(path)
    with written_aside(folder) as aside:
        save_tokenizer(tokenizer, aside, model_file.read_bytes() if model_file else None)
