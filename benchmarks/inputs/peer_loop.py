"""LLaMA-Factory and TRL in turns; run by an environment that has them, with ours on PYTHONPATH.

    PYTHON benchmarks/inputs/peer_loop.py CASE.json

The case: ``peer`` (llamafactory | trl), ``packed``, ``isolated``, ``precision``, ``steps`` of a
turn, ``micro_batch_size``, ``num_micro_batches``, and the files ``model``, ``dataset``,
``examples``, ``out`` that ``peers.py`` wrote.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.inputs.chat_inputs import CUTOFF, TEMPLATE
from benchmarks.inputs.trainer_turns import TurnCallback, training_arguments


def main() -> None:
    """Train with one peer until the parent has seen enough."""
    import torch

    case: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = {
        "version": importlib.metadata.version(case["peer"]),
        "torch": torch.__version__,
        "precision": case["precision"],
        "device": device.type,
    }
    callback = TurnCallback(case["steps"], device, facts)
    shared = training_arguments(
        precision=case["precision"],
        micro_batch_size=case["micro_batch_size"],
        num_micro_batches=case["num_micro_batches"],
        output_dir=case["out"],
    )
    {"llamafactory": run_llama_factory, "trl": run_trl}[case["peer"]](case, shared, callback)


def run_llama_factory(case: dict[str, Any], shared: dict[str, Any], callback: TurnCallback) -> None:
    """Run its own sft workflow."""
    from llamafactory.train.tuner import run_exp

    dataset = Path(case["dataset"])
    arguments = {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": case["model"],
        "template": TEMPLATE,
        "dataset": dataset.stem,
        "dataset_dir": str(dataset.parent),
        "cutoff_len": CUTOFF,
        "packing": case["packed"],
        "neat_packing": case["isolated"],
        "overwrite_cache": True,
        "plot_loss": False,
        **shared,
    }
    run_exp(arguments, callbacks=[callback])


def run_trl(case: dict[str, Any], shared: dict[str, Any], callback: TurnCallback) -> None:
    """Run SFTTrainer on the same tokens."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = json.loads(Path(case["examples"]).read_text(encoding="utf-8"))
    config = SFTConfig(**shared, max_length=CUTOFF, packing=case["packed"])
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(case["model"]),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(case["model"]),
        callbacks=[callback],
    )
    trainer.train()


if __name__ == "__main__":
    main()
