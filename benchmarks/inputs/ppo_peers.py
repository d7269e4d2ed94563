"""TRL's and LLaMA-Factory's PPO in turns; run by an environment that has them.

    PYTHON benchmarks/inputs/ppo_peers.py CASE.json

The case: ``peer`` (llamafactory | trl), ``precision``, ``num_prompts``, ``num_new_tokens``, and the
files ``model``, ``pairs``, ``examples``, ``out``. A turn is a round: a response to each prompt, its
score, one update on all of them. How long rollout and score took is reported beside the whole; in
LLaMA-Factory the update holds the log-probabilities and values that others count as score.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.inputs.chat_inputs import CUTOFF, TEMPLATE
from benchmarks.inputs.preference_peers import RANK_VARIABLES
from benchmarks.inputs.trainer_turns import training_arguments
from benchmarks.inputs.turns import Turns


class Round(TrainerCallback):
    """Waits for its go before a round; reports how long its parts took."""

    def __init__(self, case: dict[str, Any], device: torch.device) -> None:
        self.turns = Turns(1, device)
        self.seconds: dict[str, float] = {}
        self.num_pairs = case["num_prompts"]
        self.facts = {
            "version": importlib.metadata.version(case["peer"]),
            "trl": importlib.metadata.version("trl"),
            "torch": torch.__version__,
            "precision": case["precision"],
            "device": device.type,
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the first turn."""
        self._begin(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the round and wait for the next turn."""
        self._begin(state.global_step)

    def _begin(self, step: int) -> None:
        self.turns.targets += self.num_pairs
        self.turns.begin_step(step, lambda: self.facts | {"seconds": self.seconds})
        self.seconds = {}

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function or method with its time added to ``part``."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
            return result

        return wrapped


def main() -> None:
    """Train with one peer until the parent has seen enough."""
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    case: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shared = training_arguments(
        precision=case["precision"],
        micro_batch_size=case["num_prompts"],
        num_micro_batches=1,
        output_dir=case["out"],
    )
    shared["learning_rate"] = 1e-6
    run = {"llamafactory": run_llama_factory, "trl": run_trl}[case["peer"]]
    run(case, shared, Round(case, device))


def run_llama_factory(case: dict[str, Any], shared: dict[str, Any], turn: Round) -> None:
    """Run its own ppo workflow; the actor carries the value head, the reward model is another."""
    from llamafactory.hparams import get_train_args
    from llamafactory.train.ppo import run_ppo
    from llamafactory.train.ppo.trainer import CustomPPOTrainer
    from transformers import PreTrainedTokenizerBase

    for part, method in (("rollout", "get_inputs"), ("score", "get_rewards")):
        setattr(CustomPPOTrainer, method, turn.timed(part, getattr(CustomPPOTrainer, method)))
    arguments = {
        "stage": "ppo",
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": case["model"],
        "reward_model": case["model"],
        "reward_model_type": "full",
        "template": TEMPLATE,
        "dataset": "prompts",
        "dataset_dir": str(Path(case["pairs"]).parent),
        "cutoff_len": CUTOFF,
        "overwrite_cache": True,
        "plot_loss": False,
        "disable_gradient_checkpointing": True,
        "ppo_epochs": 1,
        "max_new_tokens": case["num_new_tokens"],
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        **shared,
    }
    # Transformers 5 no longer has what its PPO asks a tokenizer for.
    PreTrainedTokenizerBase.additional_special_tokens_ids = property(lambda self: [])
    # Not through its tuner, which imports trainers that want a newer TRL than its PPO does.
    model, data, training, finetuning, generating = get_train_args(arguments)
    run_ppo(model, data, training, finetuning, generating, callbacks=[turn])


def run_trl(case: dict[str, Any], shared: dict[str, Any], turn: Round) -> None:
    """Run PPOTrainer with four models."""
    import trl.trainer.ppo_trainer as module
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )
    from trl import PPOConfig, PPOTrainer

    module.batch_generation = turn.timed("rollout", module.batch_generation)
    module.get_reward = turn.timed("score", module.get_reward)
    plain, timed = module.forward, turn.timed("score", module.forward)
    # With gradients it belongs to the update.
    module.forward = lambda *args: (plain if torch.is_grad_enabled() else timed)(*args)
    examples = json.loads(Path(case["examples"]).read_text(encoding="utf-8"))
    rows = Dataset.from_list([{"input_ids": e["prompt_ids"]} for e in examples])
    tokenizer = AutoTokenizer.from_pretrained(case["model"], padding_side="left")
    tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    policy, reference = (AutoModelForCausalLM.from_pretrained(case["model"]) for _ in range(2))
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(case["model"], num_labels=1)
        for _ in range(2)
    )
    shared.pop("max_steps")
    trainer = PPOTrainer(
        args=PPOConfig(
            **shared,
            gradient_checkpointing=False,
            total_episodes=1_000_000 * case["num_prompts"],
            response_length=case["num_new_tokens"],
            local_rollout_forward_batch_size=case["num_prompts"],
            num_ppo_epochs=1,
            num_mini_batches=1,
            num_sample_generations=0,
            temperature=1.0,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[turn],
    )
    trainer.train()


if __name__ == "__main__":
    main()
