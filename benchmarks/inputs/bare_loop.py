"""What one would write by hand: transformers' model and loss in a plain PyTorch loop.

The loader's rows, AdamW(fused=True) over two groups, gradient clipping, the same learning rates,
one ``loss.item()`` a step; DistributedDataParallel around the model on several ranks. In bf16 and
fp16 the weights are of that precision and the optimizer works on an fp32 copy of them, as ours
does.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks.inputs.turns import Turns
from tokenizer.load import load_tokenizer, num_ids
from trainer.config import OptimConfig, RunConfig
from trainer.data.batches.loader import TrainLoader
from trainer.data.prepared.prepare import open_store
from trainer.engine.engine import choose_precision
from trainer.engine.precision import DTYPES
from trainer.models.load import load_model, make_config
from trainer.plan.schedule import lr_factor

if TYPE_CHECKING:
    from trainer.data.batches.collate import Batch
    from trainer.stage import Context


def train_barely(context: Context, device: torch.device, steps: int) -> None:
    """Train until the parent has seen enough, with the real stage's rows and hyperparameters."""
    config = context.config
    loader = make_loader(config, context.rank, context.world_size)
    precision = choose_precision(config.engine.precision)
    turns = Turns(steps, device)
    weights, model = make_model(config, precision, device)
    masters = make_masters(weights, precision)
    optimizer = make_optimizer(masters, config.optim)
    forward = DistributedDataParallel(model) if context.world_size > 1 else model
    facts: dict[str, Any] = {
        "num_params": sum(map(torch.numel, weights)),
        "precision": precision,
        "device": device.type,
    }
    batches = iter(loader)
    for step in range(config.loop.max_steps):
        turns.begin_step(step, lambda: facts)
        window = list(islice(batches, loader.micro_batches_per_step))
        total = backward(forward, window, device, context.world_size)
        turns.tokens += sum(batch.num_tokens for batch in window)
        turns.targets += sum(batch.num_trained for batch in window)
        update(weights, masters, optimizer, learning_rate(config, step), config.optim.grad_clip)
        if context.world_size > 1:
            torch.distributed.all_reduce(total)
        facts["loss"] = total.item()


def make_loader(config: RunConfig, rank: int = 0, world_size: int = 1) -> TrainLoader:
    """Return the loader that the stage would use."""
    store = open_store(config.data, str(config.tokenizer.path))
    return TrainLoader(
        store, config.data, seed=0, rank=rank, world_size=world_size,
        rows_per_step=config.loop.global_batch_tokens // config.data.max_length,
        micro_batch_size=config.loop.micro_batch_size,
    )  # fmt: skip


def make_model(
    config: RunConfig, precision: str, device: torch.device
) -> tuple[list[torch.nn.Parameter], Any]:
    """Return transformers' model from scratch, and its parameters."""
    num_tokens = num_ids(load_tokenizer(str(config.tokenizer.path)))
    hf_config = make_config(config.model, num_tokens, {})
    model = load_model(config.model, hf_config, DTYPES[precision], config.loop.seed).to(device)
    return list(model.parameters()), model


def make_masters(weights: list[torch.nn.Parameter], precision: str) -> list[torch.nn.Parameter]:
    """Return fp32 copies for the optimizer; in fp32 the weights themselves."""
    if precision == "fp32":
        return weights
    return [torch.nn.Parameter(weight.detach().float()) for weight in weights]


def make_optimizer(masters: list[torch.nn.Parameter], optim: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    groups = [
        {"params": [m for m in masters if m.dim() >= 2], "weight_decay": optim.weight_decay},
        {"params": [m for m in masters if m.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (optim.betas[0], optim.betas[1])
    return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)


def backward(
    forward: Any, window: Sequence[Batch], device: torch.device, world_size: int
) -> torch.Tensor:
    """Add up the gradients of a step's micro-batches; return its mean loss."""
    count = torch.tensor(sum(batch.num_trained for batch in window))
    if world_size > 1:
        torch.distributed.all_reduce(count)
    total = torch.zeros((), device=device)
    for number, batch in enumerate(window, 1):
        wait = world_size > 1 and number < len(window)
        with forward.no_sync() if wait else nullcontext():
            loss = forward(
                input_ids=batch.input_ids.to(device),
                position_ids=batch.position_ids.to(device),
                labels=batch.labels.to(device),
                num_items_in_batch=count.to(device),
                use_cache=False,  # or packed documents would see each other
            ).loss
            (loss * world_size).backward()
        total += loss.detach()
    return total


def update(
    weights: list[torch.nn.Parameter],
    masters: list[torch.nn.Parameter],
    optimizer: torch.optim.AdamW,
    lr: float,
    grad_clip: float,
) -> None:
    """Do the optimizer's step on the masters and copy them into the weights."""
    if masters is not weights:
        for master, weight in zip(masters, weights, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
    torch.nn.utils.clip_grad_norm_(masters, grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    if masters is not weights:
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)


def learning_rate(config: RunConfig, step: int) -> float:
    """Return the stage's learning rate of a step."""
    return config.optim.lr * lr_factor(
        config.schedule.name,
        step,
        max_steps=config.loop.max_steps,
        warmup_steps=config.schedule.warmup_steps,
        min_lr_ratio=config.schedule.min_lr_ratio,
    )
