"""What the stages that learn the next token share: data, model, meters, evaluation."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenizer.load import check_pair, load_tokenizer
from trainer.config import RunConfig
from trainer.data.collate import Batch
from trainer.data.loader import EvalLoader, TrainLoader
from trainer.data.prepare import open_store
from trainer.data.store import TokenStore
from trainer.engine.engine import DTYPES
from trainer.environment import describe_environment
from trainer.errors import ConfigError
from trainer.held_out import evaluate_source
from trainer.inputs import describe_inputs, refuse_changes, tokenizer_path
from trainer.loop import TrainStage
from trainer.metrics.bag import MetricBag
from trainer.metrics.meters import Meters, find_peak
from trainer.metrics.sinks import Sinks
from trainer.models.load import read_architecture
from trainer.numerics import FiniteGuard
from trainer.plan.flops import ModelShape, flops_per_token
from trainer.plan.schedule import lr_factor
from trainer.policy import build_policy, keep_tokenizer
from trainer.signals import StopRequest
from trainer.stage import Context


@dataclass
class NextTokenStage(TrainStage):
    """Train one language model on the rows of a token store by its next-token loss."""

    def check(self, config: RunConfig) -> list[str]:
        """Return what contradicts the model: missing tokenizer, rows longer than its positions."""
        problems = []
        if tokenizer_path(config) is None:
            problems.append(
                "tokenizer.path is null and the model starts from scratch; give a tokenizer folder "
                "or .model file"
            )
        if config.model.path is None and config.peft.mode != "full":
            problems.append(
                f"peft.mode={config.peft.mode} keeps weights as they are, but model.path is null "
                "and they would be random; give a model folder or use peft=full"
            )
        try:
            positions = read_architecture(config.model).get("max_position_embeddings")
        except ConfigError as error:
            return [*problems, str(error)]
        if positions and config.data.max_length > positions:
            problems.append(
                f"data.max_length={config.data.max_length} is longer than the model's "
                f"max_position_embeddings={positions}; use {positions} or fewer"
            )
        return problems

    def setup(self, context: Context, sinks_step: int) -> Sinks:
        """Open the store, load the model into the engine, open the sinks."""
        self.config, self.context = context.config, context
        config = self.config
        path = tokenizer_path(config)
        if path is None:
            raise ConfigError("\n".join(self.check(config)))
        if config.model.path:
            check_pair(config.model.path, path)
        self.tokenizer = self.load_tokenizer(path)
        self.store: TokenStore = open_store(config.data, path)
        if context.rank == 0:
            keep_tokenizer(self.tokenizer, Path(path), context.run_dir / "tokenizer")
        self.policy, model_config = build_policy(context, self.tokenizer)
        self.bag, self.guard = MetricBag(self.policy.device), FiniteGuard()
        self.meters = self._make_meters(model_config)
        self._tokens = 0
        plain = dataclasses.asdict(config)
        sinks = Sinks(
            context.run_dir, config.log, config.name, plain, context.rank == 0, sinks_step
        )
        environment = describe_environment(self.policy.device)
        environment |= {"num_ranks": context.world_size, "zero_stage": config.engine.zero_stage}
        environment |= {"precision": self.policy.precision, "peak": self.peak.source}
        sinks.event(sinks_step, "environment", **environment)
        return sinks

    def load_tokenizer(self, path: str) -> Any:
        """Return the run's tokenizer, as it is kept in the run's folder."""
        return load_tokenizer(path)

    def _make_meters(self, model_config: dict[str, Any]) -> Meters:
        config = self.config
        shape = ModelShape.from_config(model_config)
        self.peak = find_peak(self.policy.device, DTYPES[self.policy.precision])
        return Meters(
            config.loop.max_steps,
            self.policy.device,
            flops_per_token(shape, config.data.max_length, self.policy.trained_share()).total,
            self.peak.flops_per_s,
            self.context.world_size,
        )

    def batches(self, state: dict[str, Any] | None) -> Iterator[Batch]:
        """Yield this rank's micro-batches from where ``state`` left off."""
        loop, data = self.config.loop, self.config.data
        self._tokens = state["tokens"] if state else 0
        self._inputs = describe_inputs(self.config, self.store)
        if state:
            refuse_changes(state["inputs"], self._inputs)
        self.loader = TrainLoader(
            self.store,
            data,
            seed=loop.seed,
            rows_per_step=loop.global_batch_tokens // data.max_length,
            micro_batch_size=loop.micro_batch_size,
            rank=self.context.rank,
            world_size=self.context.world_size,
            start_row=state["loader"]["next_row"] if state else 0,
        )
        return iter(self.loader)

    def num_targets(self, batch: Batch) -> int:
        """Return the tokens the batch predicts."""
        return batch.num_targets

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return the summed next-token loss."""
        device = self.policy.device
        return self.policy(
            input_ids=batch.input_ids.to(device, non_blocking=True),
            position_ids=batch.position_ids.to(device, non_blocking=True),
            labels=batch.labels.to(device, non_blocking=True),
        )

    def train_step(self, step: int, batches: Iterator[Batch]) -> int:
        """Do one optimizer step on its own random numbers; return its targets."""
        # A function of (seed, rank, step): dropout needs no generator state in a checkpoint.
        key = f"{self.config.loop.seed}/{self.context.rank}/{step}".encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big"))
        count = super().train_step(step, batches)
        self._tokens += count
        return count

    def lr(self, step: int) -> float:
        """Return the learning rate of step ``step`` (from 0)."""
        schedule = self.config.schedule
        return self.config.optim.lr * lr_factor(
            schedule.name,
            step,
            max_steps=self.config.loop.max_steps,
            warmup_steps=schedule.warmup_steps,
            min_lr_ratio=schedule.min_lr_ratio,
            decay_share=schedule.decay_share,
        )

    def state(self) -> dict[str, Any]:
        """Return tokens trained on, the loader's state and what the run reads."""
        loader = self.loader.state()
        return {"tokens": self._tokens, "loader": loader, "inputs": self._inputs}

    def evaluate(self, sinks: Sinks, step: int, stop: StopRequest) -> bool:
        """Record loss, perplexity and bits per character of every source's held-out part."""
        if not self.config.loop.eval_chars:
            return True
        with self.meters.pause():
            self.policy.module.eval()
            sources = {}
            for name, source in self.store.sources.items():
                if len(source.document_ids(held_out=True)):
                    loader = self._held_out(name)
                    figures = evaluate_source(loader, self.loss, self.policy.device, stop)
                    if figures is None:
                        return False
                    sources[name] = figures
            sinks.evaluate(step, sources)
            sinks.event(step, "mixture", epochs=self.loader.epochs())
            self.write_samples(sinks, step)
            self.policy.module.train()
        return True

    def _held_out(self, name: str) -> EvalLoader:
        return EvalLoader(
            self.store,
            self.config.data,
            name,
            max_chars=self.config.loop.eval_chars,
            micro_batch_size=self.config.loop.micro_batch_size,
            rank=self.context.rank,
            world_size=self.context.world_size,
        )

    def write_samples(self, sinks: Sinks, step: int) -> None:
        """Record what the model writes after the stage's prompts; every rank generates."""
        raise NotImplementedError
