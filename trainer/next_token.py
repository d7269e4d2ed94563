"""What the stages that learn the next token share: the loss, and its evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainer.data.batches.collate import Batch
from trainer.held_out import evaluate_source
from trainer.metrics.sinks import Sinks
from trainer.signals import StopRequest
from trainer.store_stage import StoreStage


@dataclass
class NextTokenStage(StoreStage):
    """Train one language model on the rows of a token store by its next-token loss."""

    def num_targets(self, batch: Batch) -> float:
        """Return the sum of the weights of the tokens that the batch predicts."""
        return batch.num_targets

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return the summed next-token loss."""
        inputs = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "labels": batch.labels,
        }
        if batch.weights is not None:
            inputs["weights"] = batch.weights
        device = self.policy.device
        return self.policy(**{k: v.to(device, non_blocking=True) for k, v in inputs.items()})

    def measure(self, sinks: Sinks, step: int, stop: StopRequest) -> bool:
        """Record loss, perplexity and bits per character of every source's held-out part."""
        sources = {}
        for name, source in self.store.sources.items():
            if len(source.document_ids(held_out=True)):
                loader = self.held_out(name)
                figures = evaluate_source(loader, self.loss, self.policy.device, stop)
                if figures is None:
                    return False
                sources[name] = figures
        sinks.evaluate(step, sources)
        shares = {"fill_share": self.loader.fill_shares()} if self.config.data.packing else {}
        sinks.event(step, "mixture", epochs=self.loader.epochs(), **shares)
        self.write_samples(sinks, step)
        return True

    def write_samples(self, sinks: Sinks, step: int) -> None:
        """Record what the model writes after the stage's prompts; every rank generates."""
        raise NotImplementedError
