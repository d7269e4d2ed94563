"""An independent reference for stage dpo: plain PyTorch in float64, one sequence at a time."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tokenizer.load import load_tokenizer, num_ids
from trainer.config import load_config
from trainer.data.batches.loader import TrainLoader
from trainer.data.prepared.prepare import open_store
from trainer.plan.schedule import lr_factor


def train_preferences_plainly(values: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights after ``loop.max_steps`` of torch's AdamW on whole global batches."""
    config = load_config(values)
    path, objective = str(config.tokenizer.path), dict(config.stage["objective"])
    vocabulary, name = num_ids(load_tokenizer(path)), objective.pop("name")
    store = open_store(config.data, path)
    [source] = store.sources.values()
    policy = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float64)
    reference = copy.deepcopy(policy)

    def sequence(document: int, side: int) -> tuple[Tensor, Tensor]:
        first = int(source.first_lengths[document])
        span = np.s_[:first] if side > 0 else np.s_[first:]
        ids = torch.tensor(source.document(document)[span].astype(np.int64))
        return ids, torch.tensor(source.document_weights(document)[span] > 0)

    def score(model: Any, ids: Tensor, learnt: Tensor) -> tuple[Tensor, int]:
        logits = model(input_ids=ids[None]).logits[0, :-1, :vocabulary]
        logps = torch.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0]
        return logps[learnt[1:]].sum(), int(learnt[1:].sum())

    def mismatched(document: int) -> tuple[Tensor, Tensor]:
        other, hashes = document, source.text_hashes
        while hashes[other] == hashes[document]:
            other = (other + 1) % len(hashes)
        (ids, learnt), (theirs, answer) = sequence(document, 1), sequence(other, 1)
        prompt, start = int(learnt.int().argmax()), int(answer.int().argmax())
        joined = torch.cat([ids[:prompt], theirs[start:]])[: config.data.max_length]
        return joined, torch.cat([learnt[:prompt], answer[start:]])[: config.data.max_length]

    def loss_of(document: int, baseline: Tensor) -> Tensor:
        c, num_c = score(policy, *sequence(document, 1))
        r, num_r = score(policy, *sequence(document, -1))
        with torch.no_grad():
            ref_c, _ = score(reference, *sequence(document, 1))
            ref_r, _ = score(reference, *sequence(document, -1))
        beta, delta = objective.get("beta", 0.0), (c - ref_c) - (r - ref_r)
        if name == "sigmoid":
            loss = torch.log1p(torch.exp(-beta * delta))
        elif name == "ipo":
            loss = ((c - ref_c) / num_c - (r - ref_r) / num_r - 1 / (2 * beta)) ** 2
        elif name == "simpo":
            loss = torch.log1p(torch.exp(objective["gamma"] - beta * (c / num_c - r / num_r)))
        elif name == "orpo":
            p, q = torch.exp(c / num_c), torch.exp(r / num_r)
            odds = (p / (1 - p)) / (q / (1 - q))
            loss = -c / num_c + objective["odds_weight"] * torch.log1p(1 / odds)
        else:
            assert name == "kto"
            good = objective["desirable_weight"] * torch.sigmoid(-beta * (c - ref_c - baseline))
            bad = objective["undesirable_weight"] * torch.sigmoid(beta * (r - ref_r - baseline))
            loss = (good + bad) / 2  # the mean over answers, of which a pair has two
        return loss - config.stage.get("nll_weight", 0.0) * c / num_c

    matrices = [p for p in policy.parameters() if p.dim() > 1]
    vectors = [p for p in policy.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.optim.weight_decay},
         {"params": vectors, "weight_decay": 0.0}],
        betas=tuple(config.optim.betas), eps=config.optim.eps,
    )  # fmt: skip
    rows = config.loop.global_batch_tokens // config.data.max_length
    loader = iter(
        TrainLoader(
            store, config.data, seed=config.loop.seed, rows_per_step=rows, micro_batch_size=rows,
            rank=0, world_size=1,
        )
    )  # fmt: skip
    for step in range(config.loop.max_steps):
        examples = next(loader).examples
        documents = examples.documents[examples.sides > 0].tolist()
        baseline = torch.zeros((), dtype=torch.float64)
        if name == "kto":
            with torch.no_grad():
                apart = [
                    score(policy, *mismatched(d))[0] - score(reference, *mismatched(d))[0]
                    for d in documents
                ]
            baseline = torch.stack(apart).mean().clamp(min=0)
        loss = torch.stack([loss_of(document, baseline) for document in documents]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.optim.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * lr_factor(
                config.schedule.name, step, max_steps=config.loop.max_steps,
                warmup_steps=config.schedule.warmup_steps,
                min_lr_ratio=config.schedule.min_lr_ratio,
            )  # fmt: skip
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().float() for name, p in policy.named_parameters()}
