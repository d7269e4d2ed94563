"""transformers' own Trainer on the conversations our stage trains on, packed or padded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from benchmarks.inputs.bare_loop import make_loader, make_model
from benchmarks.inputs.chat_inputs import read_examples
from benchmarks.inputs.trainer_turns import TurnCallback, training_arguments
from tokenizer.load import load_tokenizer
from trainer.engine.engine import choose_precision

if TYPE_CHECKING:
    from trainer.stage import Context


class PackedTrainer(Trainer):
    """Trainer over our loader's packed batches, whose documents position ids isolate."""

    def get_train_dataloader(self) -> Any:
        """Return the loader's micro-batches as the model's arguments."""
        return DataLoader(self.train_dataset, batch_size=None)


class PackedBatches(IterableDataset):
    """A loader's micro-batches as keyword arguments of the model."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Any:
        """Yield the batches."""
        for batch in self.loader:
            yield {
                "input_ids": batch.input_ids,
                "position_ids": batch.position_ids,
                "labels": batch.labels,
            }


def train_with_trainer(context: Context, device: torch.device, steps: int) -> None:
    """Train until the parent has seen enough, in Trainer's own way of mixed precision.

    In bf16 that is autocast over fp32 weights.
    """
    config = context.config
    precision = choose_precision(config.engine.precision)
    facts = {"precision": precision, "device": device.type}
    callback = TurnCallback(steps, device, facts)
    _, model = make_model(config, "fp32", device)
    model.config.use_cache = False
    micro_batch_size = config.loop.micro_batch_size
    rows = config.loop.global_batch_tokens // config.data.max_length
    arguments = training_arguments(
        precision=precision,
        micro_batch_size=micro_batch_size,
        num_micro_batches=rows // micro_batch_size,
        output_dir=str(context.run_dir),
    )
    tokenizer = load_tokenizer(str(config.tokenizer.path))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    shared: dict[str, Any] = {
        "model": model, "args": TrainingArguments(**arguments), "callbacks": [callback]
    }  # fmt: skip
    if config.data.packing:
        trainer: Trainer = PackedTrainer(**shared, train_dataset=PackedBatches(make_loader(config)))
    else:
        collator = DataCollatorForSeq2Seq(tokenizer)
        trainer = Trainer(**shared, train_dataset=read_examples(config), data_collator=collator)
    trainer.train()
