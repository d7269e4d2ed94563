"""Independent references: the same training written in a dozen lines of plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tokenizer.load import load_tokenizer, num_ids
from trainer.config import RunConfig, load_config
from trainer.data.batches.collate import Batch
from trainer.data.batches.loader import TrainLoader
from trainer.data.prepared.prepare import open_store
from trainer.data.prepared.store import TokenStore
from trainer.models.load import load_model, make_config
from trainer.plan.schedule import lr_factor


def descend(
    model: torch.nn.Module,
    config: RunConfig,
    store: TokenStore,
    mean_loss: Callable[[Batch], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return the weights after ``loop.max_steps`` of torch's AdamW, whole batches at once.

    Args:
        model: in float64.
        config: of the run.
        store: its data.
        mean_loss: of a global batch.
    """
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.optim.weight_decay},
         {"params": vectors, "weight_decay": 0.0}],
        betas=tuple(config.optim.betas), eps=config.optim.eps,
    )  # fmt: skip
    rows = config.loop.global_batch_tokens // config.data.max_length
    loader = TrainLoader(
        store, config.data, seed=config.loop.seed, rows_per_step=rows, micro_batch_size=rows,
        rank=0, world_size=1,
    )  # fmt: skip
    for step, batch in zip(range(config.loop.max_steps), loader, strict=False):
        mean_loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * lr_factor(
                config.schedule.name, step, max_steps=config.loop.max_steps,
                warmup_steps=config.schedule.warmup_steps,
                min_lr_ratio=config.schedule.min_lr_ratio,
            )  # fmt: skip
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().float() for name, p in model.named_parameters()}


def train_plainly(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the weights of a model that learnt the next token, each document seen alone."""
    config = load_config(values)
    path = str(config.tokenizer.path)
    tokenizer = load_tokenizer(path)
    special = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    hf_config = make_config(config.model, num_ids(tokenizer), special)
    model = load_model(config.model, hf_config, torch.float32, config.loop.seed).double().train()
    assert isinstance(model, AutoModelForCausalLM._model_mapping[type(hf_config)])

    def mean_loss(batch: Batch) -> torch.Tensor:
        count, loss = 0.0, torch.zeros((), dtype=torch.float64)
        for number, lengths in enumerate(batch.piece_lengths):
            ends = torch.tensor(lengths).cumsum(0).tolist()
            for start, stop in zip([0, *ends], ends, strict=False):
                # Each document alone: isolation without any mask.
                ids = batch.input_ids[number, start:stop]
                weights = torch.ones(stop - start)
                if batch.weights is not None:
                    weights = batch.weights[number, start:stop]
                logits = model(input_ids=ids[None]).logits[0, :-1, : num_ids(tokenizer)]
                nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
                loss = loss + (nll * weights[1:]).sum()
                count += float(weights[1:].double().sum())
        return loss / count

    return descend(model, config, open_store(config.data, path), mean_loss)
