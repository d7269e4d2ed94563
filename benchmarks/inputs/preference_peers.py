"""TRL's and LLaMA-Factory's DPO and reward training in turns; run by an environment that has them.

    PYTHON benchmarks/inputs/preference_peers.py CASE.json

The case: ``peer`` (llamafactory | trl), ``stage`` (dpo | reward), ``way`` (plain | precomputed |
lora), ``precision``, ``micro_batch_size``, ``num_micro_batches``, ``num_tokens`` of a turn, and the
files ``model``, ``pairs``, ``examples``, ``out``. A turn is a step over all pairs.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.inputs.chat_inputs import CUTOFF, TEMPLATE
from benchmarks.inputs.trainer_turns import TurnCallback, training_arguments
from benchmarks.inputs.turns import Turns

LORA_RANK = 8
# What makes accelerate wrap the model for several ranks; there is one.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def main() -> None:
    """Train with one peer until the parent has seen enough."""
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    case: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = {
        "version": importlib.metadata.version(case["peer"]),
        "torch": torch.__version__,
        "precision": case["precision"],
        "device": device.type,
    }
    callback = TurnCallback(1, device, facts, count_pairs)
    shared = training_arguments(
        precision=case["precision"],
        micro_batch_size=case["micro_batch_size"],
        num_micro_batches=case["num_micro_batches"],
        output_dir=case["out"],
    )
    shared["remove_unused_columns"] = False
    find_packages()
    if case["peer"] == "llamafactory":
        run_llama_factory(case, shared, callback)
    else:
        {"dpo": run_trl_dpo, "reward": run_trl_reward}[case["stage"]](case, shared, callback)


def find_packages() -> None:
    """Let TRL know which packages are missing.

    TRL 0.24 asks transformers, which since version 5 answers with a pair, and takes a pair that
    says no for a yes.
    """
    import trl.import_utils as found

    for name, value in list(vars(found).items()):
        if name.endswith("_available") and isinstance(value, tuple):
            setattr(found, name, value[0])


def count_pairs(turns: Turns, inputs: dict[str, Any]) -> None:
    """Add a batch's pairs and tokens; each pair's prompt counts with both answers."""
    masks = {name: int(mask.sum()) for name, mask in inputs.items() if name.endswith("mask")}
    if "prompt_attention_mask" in masks:
        turns.targets += len(inputs["prompt_attention_mask"])
        turns.tokens += masks["chosen_attention_mask"] + masks["rejected_attention_mask"]
        turns.tokens += 2 * masks["prompt_attention_mask"]
    else:
        turns.targets += len(inputs["input_ids"]) // 2
        turns.tokens += masks["attention_mask"]


def run_llama_factory(case: dict[str, Any], shared: dict[str, Any], callback: TurnCallback) -> None:
    """Run its own dpo or rm workflow."""
    from llamafactory.train.tuner import run_exp

    shared.pop("remove_unused_columns")
    arguments = {
        "stage": {"dpo": "dpo", "reward": "rm"}[case["stage"]],
        "do_train": True,
        "finetuning_type": "lora" if case["way"] == "lora" else "full",
        "lora_rank": LORA_RANK,
        "model_name_or_path": case["model"],
        "template": TEMPLATE,
        "dataset": "pairs",
        "dataset_dir": str(Path(case["pairs"]).parent),
        "cutoff_len": CUTOFF,
        "disable_gradient_checkpointing": True,  # the others do not recompute either
        "overwrite_cache": True,
        "plot_loss": False,
        **shared,
    }
    run_exp(arguments, callbacks=[callback])


def run_trl_dpo(case: dict[str, Any], shared: dict[str, Any], callback: TurnCallback) -> None:
    """Run DPOTrainer on the rendered texts."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    examples = json.loads(Path(case["examples"]).read_text(encoding="utf-8"))
    keys = ("prompt", "chosen", "rejected")
    rows = [{key: example[key] for key in keys} for example in examples]
    model = AutoModelForCausalLM.from_pretrained(case["model"])
    model.warnings_issued = {}  # TRL 0.24 writes into what transformers 5 no longer has
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            **shared,
            max_length=None,
            max_prompt_length=None,
            gradient_checkpointing=False,
            precompute_ref_log_probs=case["way"] == "precomputed",
            precompute_ref_batch_size=case["micro_batch_size"],
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(case["model"]),
        peft_config=LoraConfig(r=LORA_RANK, target_modules="all-linear")
        if case["way"] == "lora"
        else None,
        callbacks=[callback],
    )
    trainer.train()


def run_trl_reward(case: dict[str, Any], shared: dict[str, Any], callback: TurnCallback) -> None:
    """Run RewardTrainer on the token ids."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    examples = json.loads(Path(case["examples"]).read_text(encoding="utf-8"))
    rows = [
        {"chosen_input_ids": e["chosen_ids"], "rejected_input_ids": e["rejected_ids"]}
        for e in examples
    ]
    tokenizer = AutoTokenizer.from_pretrained(case["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(case["model"], num_labels=1),
        args=RewardConfig(**shared, max_length=CUTOFF, gradient_checkpointing=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()


if __name__ == "__main__":
    main()
