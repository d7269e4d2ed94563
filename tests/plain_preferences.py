"""An independent reference for stage dpo: plain PyTorch in float64, one sequence at a time."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from plain_loop import descend
from torch import Tensor
from transformers import AutoModelForCausalLM

from tokenizer.load import load_tokenizer, num_ids
from trainer.config import load_config
from trainer.data.batches.collate import Batch
from trainer.data.prepared.prepare import open_store
from trainer.data.prepared.store import SourceStore

Sequence = tuple[Tensor, Tensor]  # ids, and which of them are learnt


def train_preferences_plainly(values: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights after ``loop.max_steps`` of torch's AdamW on whole global batches."""
    config = load_config(values)
    path = str(config.tokenizer.path)
    objective = {**config.stage["objective"], "nll_weight": config.stage.get("nll_weight", 0.0)}
    vocabulary, max_length = num_ids(load_tokenizer(path)), config.data.max_length
    store = open_store(config.data, path)
    [source] = store.sources.values()
    policy = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float64)
    reference = copy.deepcopy(policy)

    def score(model: Any, sequence: Sequence) -> tuple[Tensor, int]:
        ids, learnt = sequence
        logits = model(input_ids=ids[None]).logits[0, :-1, :vocabulary]
        logps = torch.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0]
        return logps[learnt[1:]].sum(), int(learnt[1:].sum())

    def baseline_of(documents: list[int]) -> Tensor:
        asides = [mismatched(source, document, max_length) for document in documents]
        apart = [score(policy, aside)[0] - score(reference, aside)[0] for aside in asides]
        return torch.stack(apart).mean().clamp(min=0)

    def mean_loss(batch: Batch) -> Tensor:
        assert batch.examples is not None
        documents = batch.examples.documents[batch.examples.sides > 0].tolist()
        baseline, losses = torch.zeros((), dtype=torch.float64), []
        if objective["name"] == "kto":
            with torch.no_grad():
                baseline = baseline_of(documents)
        for document in documents:
            sides = [sequence_of(source, document, side) for side in (1, -1)]
            with torch.no_grad():
                references = [score(reference, side)[0] for side in sides]
            scores = [score(policy, side) for side in sides]
            losses.append(loss_of(objective, scores, references, baseline))
        return torch.stack(losses).mean()

    return descend(policy, config, store, mean_loss)


def sequence_of(source: SourceStore, document: int, side: int) -> Sequence:
    first = int(source.first_lengths[document])
    span = np.s_[:first] if side > 0 else np.s_[first:]
    ids = torch.tensor(source.document(document)[span].astype(np.int64))
    return ids, torch.tensor(source.document_weights(document)[span] > 0)


def mismatched(source: SourceStore, document: int, max_length: int) -> Sequence:
    """Return a document's prompt with the answer to the next other prompt."""
    other, hashes = document, source.text_hashes
    while hashes[other] == hashes[document]:
        other = (other + 1) % len(hashes)
    (ids, learnt), (theirs, answer) = (sequence_of(source, d, 1) for d in (document, other))
    prompt, start = int(learnt.int().argmax()), int(answer.int().argmax())
    joined = torch.cat([ids[:prompt], theirs[start:]])[:max_length]
    return joined, torch.cat([learnt[:prompt], answer[start:]])[:max_length]


def loss_of(
    objective: dict[str, Any],
    scores: list[tuple[Tensor, int]],
    references: list[Tensor],
    baseline: Tensor,
) -> Tensor:
    """Return the loss of a pair as the papers write it, without care for large numbers."""
    (c, num_c), (r, num_r) = scores
    ref_c, ref_r = references
    beta, delta = objective.get("beta", 0.0), (c - ref_c) - (r - ref_r)
    name = objective["name"]
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
    return loss - objective["nll_weight"] * c / num_c
