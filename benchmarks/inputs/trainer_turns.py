"""transformers' Trainer in turns; also inside LLaMA-Factory and TRL, which are built on it.

Imported by processes of other environments too: torch, transformers and ``turns.py`` only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from benchmarks.inputs.turns import Turns

IGNORE_INDEX = -100

Count = Callable[[Turns, dict[str, Any]], None]


def count_targets(turns: Turns, inputs: dict[str, Any]) -> None:
    """Add a batch's trained tokens and its tokens without padding."""
    labels, mask = inputs["labels"], inputs.get("attention_mask")
    turns.targets += int((labels[:, 1:] != IGNORE_INDEX).sum())
    turns.tokens += labels.numel() if mask is None else int((mask != 0).sum())


class TurnCallback(TrainerCallback):
    """Waits for its go before a step and reports what the steps before trained on.

    Every Trainer of the process counts what its ``training_step`` is given.
    """

    def __init__(
        self,
        steps: int,
        device: torch.device,
        facts: dict[str, Any],
        count: Count = count_targets,
    ) -> None:
        self.turns, self.facts = Turns(steps, device), dict(facts)
        _count_batches(self.turns, count)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the turn, if one begins."""
        model = kwargs["model"]
        self.facts["num_params"] = sum(map(torch.numel, model.parameters()))
        self.facts["weights"] = str(next(model.parameters()).dtype).removeprefix("torch.")
        self.turns.begin_step(state.global_step, lambda: self.facts)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the last loss."""
        if logs and "loss" in logs:
            self.facts["loss"] = float(logs["loss"])


def _count_batches(turns: Turns, count: Count) -> None:
    plain = Trainer.training_step

    def training_step(self: Trainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        count(turns, inputs)
        return plain(self, model, inputs, *args, **kwargs)

    Trainer.training_step = training_step


def training_arguments(
    *, precision: str, micro_batch_size: int, num_micro_batches: int, output_dir: str
) -> dict[str, Any]:
    """Return what is set alike for Trainer, LLaMA-Factory and TRL; the rest is their default."""
    return {
        "output_dir": output_dir,
        "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": num_micro_batches,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine",
        "max_steps": 1_000_000,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
