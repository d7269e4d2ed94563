"""DPO and reward training as one would write them by hand: transformers' model, padded pairs.

    python benchmarks/inputs/bare_pairs.py CASE.json

The case is that of ``preference_peers.py``. Two sequences a pair, padded to the longest of the
micro-batch; for DPO a second, frozen model; log-probabilities of whole logits in fp32, scores at
the last tokens. Weights, optimizer and clipping are those of ``bare_loop.py``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.inputs.bare_loop import make_masters, make_optimizer, update
from benchmarks.inputs.turns import Turns
from trainer.config import OptimConfig
from trainer.engine.precision import DTYPES

BETA = 0.1
Examples = list[dict[str, list[int]]]


def main() -> None:
    """Train until the parent has seen enough."""
    case: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    examples: Examples = json.loads(Path(case["examples"]).read_text(encoding="utf-8"))
    turns = Turns(1, device)
    learner: Pairs = {"dpo": Dpo, "reward": Reward}[case["stage"]](case, device)
    weights = list(learner.model.parameters())
    masters = make_masters(weights, case["precision"])
    optim = OptimConfig(lr=2e-5, weight_decay=0.0)
    optimizer = make_optimizer(masters, optim)
    facts = {
        "num_params": sum(map(torch.numel, weights)),
        "precision": case["precision"],
        "device": device.type,
    }
    size = case["micro_batch_size"]
    step = 0
    while True:
        turns.begin_step(step, lambda: facts)
        total = torch.zeros((), device=device)
        for start in range(0, len(examples), size):
            loss = learner.loss(examples[start : start + size]) / len(examples)
            loss.backward()
            total += loss.detach()
        turns.targets += len(examples)
        turns.tokens += case["num_tokens"]
        update(weights, masters, optimizer, optim.lr, 1.0)
        facts["loss"] = total.item()
        step += 1


class Pairs:
    """A model and the padded sequences of a micro-batch."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model.to(device), device

    def pad(self, examples: Examples) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ids, attention mask and prompt lengths, the better answers first."""
        sequences = [e["chosen_ids"] for e in examples] + [e["rejected_ids"] for e in examples]
        lengths = torch.tensor([len(ids) for ids in sequences])
        prompts = torch.tensor([len(e["prompt_ids"]) for e in examples] * 2)
        ids = pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        return ids.to(self.device), mask.long().to(self.device), prompts.to(self.device)

    def loss(self, examples: Examples) -> torch.Tensor:
        """Return the pairs' summed loss."""
        raise NotImplementedError


class Dpo(Pairs):
    """DPO's sigmoid loss with a frozen second model."""

    def __init__(self, case: dict[str, Any], device: torch.device) -> None:
        dtype = DTYPES[case["precision"]]
        load = AutoModelForCausalLM.from_pretrained
        super().__init__(load(case["model"], dtype=dtype), device)
        self.reference = load(case["model"], dtype=dtype).to(device).requires_grad_(False)

    def loss(self, examples: Examples) -> torch.Tensor:
        """Return the pairs' summed loss."""
        inputs = self.pad(examples)
        with torch.no_grad():
            reference = answer_logps(self.reference, *inputs)
        chosen, rejected = (answer_logps(self.model, *inputs) - reference).chunk(2)
        return -logsigmoid(BETA * (chosen - rejected)).sum()


def answer_logps(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, prompts: torch.Tensor
) -> torch.Tensor:
    """Return the answers' log-probabilities ``[rows]`` from ids and mask ``[rows, length]``."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    answers = torch.arange(1, ids.shape[1], device=ids.device) >= prompts[:, None]
    return (logps * (answers & mask[:, 1:].bool())).sum(-1)


class Reward(Pairs):
    """The pairwise ranking loss over a one-label classifier."""

    def __init__(self, case: dict[str, Any], device: torch.device) -> None:
        load = AutoModelForSequenceClassification.from_pretrained
        model = load(case["model"], num_labels=1, dtype=DTYPES[case["precision"]])
        model.config.pad_token_id = 0
        super().__init__(model, device)

    def loss(self, examples: Examples) -> torch.Tensor:
        """Return the pairs' summed loss."""
        ids, mask, _ = self.pad(examples)
        hidden = self.model.model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        last = hidden[torch.arange(len(ids), device=ids.device), mask.sum(-1) - 1]
        chosen, rejected = self.model.score(last).float()[:, 0].chunk(2)
        return -logsigmoid(chosen - rejected).sum()


if __name__ == "__main__":
    main()
