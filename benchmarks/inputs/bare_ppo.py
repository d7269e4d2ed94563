"""A round of PPO as one would write it by hand: transformers' models and ``generate``.

    python benchmarks/inputs/bare_ppo.py CASE.json

The case is that of ``ppo_peers.py``. Policy and critic are trained, reference and reward model
frozen; prompts are padded on the left, whole logits of the responses kept in fp32. Weights,
optimizers and clipping are those of ``bare_loop.py``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
)

from benchmarks.inputs.bare_loop import make_masters, make_optimizer, update
from benchmarks.inputs.turns import Turns
from trainer.config import OptimConfig
from trainer.engine.precision import DTYPES

KL_COEF, LAM, CLIP, LR = 0.05, 0.95, 0.2, 1e-6


class Responses(NamedTuple):
    """Prompts and responses ``[prompts, length]`` with their mask, and the prompts' width."""

    ids: Tensor
    mask: Tensor
    start: int


def main() -> None:
    """Train until the parent has seen enough."""
    case: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    examples = json.loads(Path(case["examples"]).read_text(encoding="utf-8"))
    prompts = [example["prompt_ids"] for example in examples]
    turns = Turns(1, device)
    trained = Round(case, device)
    step, seconds = 0, dict[str, float]()
    facts = {"precision": case["precision"], "device": device.type}
    while True:
        turns.begin_step(step, lambda: facts | {"seconds": dict(seconds)})
        start = time.perf_counter()
        responses = trained.roll_out(prompts, case["num_new_tokens"])
        seconds["rollout"] = time.perf_counter() - start
        start = time.perf_counter()
        old, values, advantages = trained.weigh(responses)
        seconds["score"] = time.perf_counter() - start
        trained.learn(responses, old, values, advantages)
        turns.targets += len(prompts)
        step += 1


class Round:
    """The models of a round and what is done with them."""

    def __init__(self, case: dict[str, Any], device: torch.device) -> None:
        dtype = DTYPES[case["precision"]]
        language, scalar = AutoModelForCausalLM, AutoModelForSequenceClassification
        self.device = device
        self.policy, self.reference = (
            language.from_pretrained(case["model"], dtype=dtype).to(device) for _ in range(2)
        )
        self.critic, self.judge = (
            scalar.from_pretrained(case["reward_model"], dtype=dtype).to(device) for _ in range(2)
        )
        self.weights = [*self.policy.parameters(), *self.critic.parameters()]
        self.masters = make_masters(self.weights, case["precision"])
        self.optimizer = make_optimizer(self.masters, OptimConfig(lr=LR, weight_decay=0.0))

    @torch.no_grad()
    def roll_out(self, prompts: list[list[int]], num_new_tokens: int) -> Responses:
        """Draw a response to every prompt."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.device)
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        mask = (torch.arange(width, device=self.device) >= width - lengths[:, None]).long()
        drawn = self.policy.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                do_sample=True,
                top_k=0,
                min_new_tokens=num_new_tokens,
                max_new_tokens=num_new_tokens,
                eos_token_id=2,
                pad_token_id=0,
            ),
        )
        rest = mask.new_ones(len(prompts), drawn.shape[1] - width)
        return Responses(drawn, torch.cat([mask, rest], 1), width)

    def logps(self, model: Any, responses: Responses) -> Tensor:
        """Return the log-probabilities of the responses' tokens ``[prompts, tokens]``."""
        ids, mask, start = responses
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits[:, start - 1 : -1]
        logps: Tensor = logits.float().log_softmax(-1).gather(-1, ids[:, start:, None])[..., 0]
        return logps

    def scalars(self, model: Any, responses: Responses) -> Tensor:
        """Return a scalar model's output at every position ``[prompts, length]``."""
        ids, mask, _ = responses
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        hidden = model.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        )[0]
        outputs: Tensor = model.score(hidden).float()[..., 0]
        return outputs

    @torch.no_grad()
    def weigh(self, responses: Responses) -> tuple[Tensor, Tensor, Tensor]:
        """Return old log-probabilities, values and advantages ``[prompts, tokens]``."""
        old = self.logps(self.policy, responses)
        rewards = -KL_COEF * (old - self.logps(self.reference, responses))
        rewards[:, -1] += self.scalars(self.judge, responses)[:, -1]
        values = self.scalars(self.critic, responses)[:, responses.start - 1 : -1]
        following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
        deltas = rewards + following - values
        advantages, last = torch.zeros_like(deltas), torch.zeros_like(deltas[:, 0])
        for t in reversed(range(deltas.shape[1])):  # GAE, eq. 16, arXiv:1506.02438, gamma 1
            last = advantages[:, t] = deltas[:, t] + LAM * last
        return old, values, advantages

    def learn(self, responses: Responses, old: Tensor, values: Tensor, advantages: Tensor) -> None:
        """Do one update of policy and critic on all responses."""
        spread = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        ratio = (self.logps(self.policy, responses) - old).exp()
        gains = torch.minimum(spread * ratio, spread * ratio.clamp(1 - CLIP, 1 + CLIP))
        (-gains.mean()).backward()
        now = self.scalars(self.critic, responses)[:, responses.start - 1 : -1]
        near = values + (now - values).clamp(-CLIP, CLIP)
        goal = values + advantages
        (0.5 * torch.maximum((now - goal) ** 2, (near - goal) ** 2).mean()).backward()
        update(self.weights, self.masters, self.optimizer, LR, 1.0)


if __name__ == "__main__":
    main()
