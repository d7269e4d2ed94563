"""The trained model of a stage, from the config's groups: loaded, adapted, in its engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from tokenizer.load import num_ids, save_tokenizer, sentencepiece_file
from trainer.config import grad_accum_steps
from trainer.engine.collectives import barrier
from trainer.engine.ds_config import ModelSize, make_ds_config
from trainer.engine.engine import DTYPES, Engine, choose_precision, partitioning, prepare_ops
from trainer.models.adapter_files import FOLDER
from trainer.models.adapters import (
    apply_peft,
    fill_plain,
    keep_adapter_config,
    learning_rate_factors,
)
from trainer.models.aside import written_aside
from trainer.models.head import install_fused_head, supports_fused_head
from trainer.models.language_model import PREFIX, LanguageModel
from trainer.models.load import (
    load_model,
    make_config,
    measure,
    return_freed_memory,
    special_ids,
)
from trainer.models.quantize import require_bitsandbytes
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
    config = context.config
    prepare_ops(config.engine, context.local_rank)
    precision = choose_precision(config.engine.precision)
    special = special_ids(tokenizer)
    if config.peft.mode == "qlora":
        require_bitsandbytes()
    model_config = _in_turn(context, lambda: make_config(config.model, num_ids(tokenizer), special))
    ds_config = make_ds_config(
        config.engine,
        precision=precision,
        micro_batch_size=config.loop.micro_batch_size,
        grad_accum_steps=grad_accum_steps(config, context.world_size),
        grad_clip=config.optim.grad_clip,
        size=ModelSize(*measure(model_config)),
        world_size=context.world_size,
        on_cuda=torch.cuda.is_available(),
    )
    seed = config.loop.seed
    split = partitioning(ds_config)
    quantization = config.peft.quantization if config.peft.mode == "qlora" else None
    model = load_model(config.model, model_config, DTYPES[precision], seed, split, quantization)
    if supports_fused_head(model):
        install_fused_head(model, num_ids(tokenizer))
    torch.manual_seed(seed)  # adapters start equal on every rank
    # Where transformers is said to split models, peft gathers the weights that DoRA starts from.
    with split.transformers_loading() if split else nullcontext():
        fill = split.fill if split else fill_plain
        adapted = apply_peft(model, config.peft, config.model.path, fill)
    if quantization is not None:
        return_freed_memory()  # peft looks at every weight, which computes it
    if adapted is not model and context.rank == 0:
        keep_adapter_config(adapted, context.run_dir / FOLDER, str(config.model.path))
    if config.engine.activation_checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.enable_input_require_grads()
    wrapped = LanguageModel(adapted, num_ids(tokenizer)).train()
    factors = learning_rate_factors(config.peft)
    engine = Engine(wrapped, config.engine, config.optim, ds_config, precision, PREFIX, factors)
    return engine, model_config.to_dict()


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
