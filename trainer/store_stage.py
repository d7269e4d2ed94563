"""What the stages that train on a token store share: data, model, meters, schedule, state."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import torch

from tokenizer.load import load_tokenizer
from tokenizer.pair import check_pair
from trainer import faults
from trainer.config import RunConfig
from trainer.data.batches.collate import Batch
from trainer.data.batches.eval_loader import EvalLoader
from trainer.data.batches.loader import TrainLoader
from trainer.data.prepared.prepare import open_store
from trainer.data.prepared.store import TokenStore
from trainer.engine.engine import Engine
from trainer.engine.grouping import trained_share
from trainer.engine.precision import DTYPES
from trainer.environment import describe_environment
from trainer.errors import ConfigError
from trainer.inputs import describe_inputs, refuse_changes, tokenizer_path
from trainer.length import count_steps, rows_per_step, warn_of_repetition
from trainer.loop import fit
from trainer.metrics.bag import MetricBag
from trainer.metrics.meters import Meters, find_peak
from trainer.metrics.sinks import Sinks
from trainer.models.architecture import read_architecture
from trainer.models.families import isolates_documents
from trainer.numerics import NumericsGuard
from trainer.plan.architectures import read_size
from trainer.plan.flops import ModelShape, flops_per_token
from trainer.plan.schedule import lr_factor
from trainer.policy import build_policy, keep_tokenizer
from trainer.signals import StopRequest
from trainer.stage import Context
from trainer.train_stage import TrainStage

LOG = logging.getLogger(__name__)


@dataclass
class StoreStage(TrainStage):
    """Train one engine on the rows of a token store."""

    content: ClassVar[str]  # what the stage's data must be, as in data.content

    def run(self, context: Context) -> None:
        """Train from the newest checkpoint, or the start, to ``loop.max_steps``."""
        fit(self, context)

    def check(self, config: RunConfig) -> list[str]:
        """Return what contradicts the model: missing tokenizer, rows longer than its positions."""
        problems = []
        if config.data.content != self.content:
            problems.append(
                f"data.content={config.data.content}, but stage={config.stage['name']} trains on "
                f"{self.content}; leave the key to the stage's option"
            )
        data = config.data
        if self.content == "preferences" and data.packing and not data.isolate_documents:
            problems.append(
                "data.isolate_documents=false lets the answers of a row see each other, so that "
                "they are compared with what the row holds by chance; use true, or "
                "data.packing=false"
            )
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
            positions = read_size(read_architecture(config.model), "max_position_embeddings")
        except ConfigError as error:
            return [*problems, str(error)]
        if positions and config.data.max_length > positions:
            problems.append(
                f"data.max_length={config.data.max_length} is longer than the model's "
                f"max_position_embeddings={positions}; use {positions} or fewer"
            )
        return problems

    def settle(self, config: RunConfig) -> tuple[RunConfig, list[str]]:
        """Pad what cannot be packed; turn epochs into steps."""
        config, remarks = pad_where_packing_leaks(config)
        if config.loop.epochs is None:
            return config, remarks
        path = tokenizer_path(config)
        assert path is not None  # ``check`` refuses it
        store = open_store(config.data, path)
        config, more = count_steps(config, store, self.rows_per_step(config))
        return config, remarks + more

    def rows_per_step(self, config: RunConfig) -> int:
        """Return the rows of the store that one step takes over all ranks."""
        return rows_per_step(config)

    def rows_per_batch(self, config: RunConfig) -> int:
        """Return the rows of the store that a rank takes at once."""
        return config.loop.micro_batch_size

    def build(self, context: Context) -> tuple[Engine, dict[str, Any]]:
        """Return the engine and the transformers config of the model that is trained."""
        return build_policy(context, self.tokenizer)

    def describe_inputs(self) -> dict[str, str]:
        """Return identities of everything the run reads; none may change before it resumes."""
        return describe_inputs(self.config, self.store)

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
        self.policy, model_config = self.build(context)
        self.bag, self.guard = MetricBag(self.policy.device), NumericsGuard(config.guard)
        self.meters = self._make_meters(model_config)
        self._tokens = 0
        plain = dataclasses.asdict(config)
        is_main = context.rank == 0
        where = (context.run_dir, config.log, config.name)
        sinks = Sinks(*where, plain, is_main, sinks_step, context.lease)
        if context.time_limit is not None:
            at = datetime.fromtimestamp(context.time_limit).astimezone().isoformat("T", "seconds")
            left = round(context.time_limit - time.time())
            sinks.event(sinks_step, "time_limit", at=at, seconds_left=left)
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
            flops_per_token(shape, config.data.max_length, trained_share(self.policy.module)).total,
            self.peak.flops_per_s,
            self.context.world_size,
        )

    def batches(self, state: dict[str, Any] | None) -> Iterator[Batch]:
        """Yield this rank's micro-batches from where ``state`` left off."""
        self._tokens = state["tokens"] if state else 0
        self._inputs = self.describe_inputs()
        if state:
            refuse_changes(state["inputs"], self._inputs)
        self.loader = self.make_loader(state["loader"]["next_row"] if state else 0)
        num_rows = self.rows_per_step(self.config)
        for warning in warn_of_repetition(self.config, self.loader.mixture, num_rows):
            if self.context.rank == 0:
                LOG.warning(warning)
        return self._measured(self.loader)

    def make_loader(self, start_row: int) -> TrainLoader:
        """Return what deals the store's rows to steps and ranks, from ``start_row`` on."""
        loop = self.config.loop
        return TrainLoader(
            self.store,
            self.config.data,
            seed=loop.seed,
            rows_per_step=self.rows_per_step(self.config),
            micro_batch_size=self.rows_per_batch(self.config),
            rank=self.context.rank,
            world_size=self.context.world_size,
            start_row=start_row,
        )

    def _measured(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Record what of each micro-batch is learnt and what is padding."""
        for batch in batches:
            num_tokens, size = batch.num_tokens, batch.input_ids.numel()
            self.bag.add_ratio("trained_share", batch.num_trained, num_tokens)
            self.bag.add_ratio("padding_share", size - num_tokens, size)
            yield batch

    def seed(self, batch: Batch) -> None:
        """Set the random numbers of a micro-batch, by its rows alone.

        A micro-batch holds the same rows on any number of ranks, so dropout hangs neither on that
        nor on a generator's state in a checkpoint; only on ``loop.micro_batch_size``.
        """
        torch.manual_seed(derive_seed(self.config.loop.seed, *batch.sample_ids.tolist()))

    def train_step(self, step: int, batches: Iterator[Batch]) -> int:
        """Do one optimizer step; return its tokens."""
        num_tokens = super().train_step(step, batches)
        self._tokens += num_tokens
        return num_tokens

    def lr(self, step: int) -> float:
        """Return the learning rate of step ``step`` (from 0)."""
        schedule, max_steps = self.config.schedule, self.config.loop.max_steps
        return self.config.optim.lr * lr_factor(
            schedule.name,
            step,
            max_steps=max_steps,
            warmup_steps=max(schedule.warmup_steps, round(schedule.warmup_share * max_steps)),
            min_lr_ratio=schedule.min_lr_ratio,
            decay_share=schedule.decay_share,
        )

    def state(self) -> dict[str, Any]:
        """Return tokens trained on, the loader's state and what the run reads."""
        loader = self.loader.state()
        return {"tokens": self._tokens, "loader": loader, "inputs": self._inputs}

    def progress(self) -> dict[str, float]:
        """Return tokens without padding, and passes over the data."""
        epoch = self.loader.state()["next_row"] / self.loader.mixture.rows_per_pass
        return {"tokens": self._tokens, "epoch": epoch}

    def evaluate(self, sinks: Sinks, step: int, stop: StopRequest) -> bool:
        """Measure on held-out data and record it; return False if a stop was agreed meanwhile."""
        if not self.config.loop.eval_chars:
            return True
        with self.meters.pause():
            faults.reach("evaluation", rank=self.context.rank, step=step)
            self.policy.module.eval()
            finished = self.measure(sinks, step, stop)
            self.policy.module.train()
        return finished

    def measure(self, sinks: Sinks, step: int, stop: StopRequest) -> bool:
        """Do what ``evaluate`` does, with the model in evaluation mode and the clock stopped."""
        raise NotImplementedError

    def held_out(self, name: str) -> EvalLoader:
        """Return this rank's batches of a source's held-out documents."""
        return EvalLoader(
            self.store,
            self.config.data,
            name,
            max_chars=self.config.loop.eval_chars,
            micro_batch_size=self.config.loop.micro_batch_size,
            rank=self.context.rank,
            world_size=self.context.world_size,
        )


def derive_seed(*key: int) -> int:
    """Return the seed of a generator that belongs to ``key``."""
    text = "/".join(map(str, key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")


def pad_where_packing_leaks(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Turn packing off for a model that would let the documents of a row see each other."""
    data, architecture = config.data, read_architecture(config.model)
    if not (data.packing and data.isolate_documents) or isolates_documents(architecture):
        return config, []
    remark = (
        f"model_type={architecture.get('model_type')} does not keep the documents of a packed row "
        "apart, so data.packing is false for this run: one document a row, padded. "
        "data.isolate_documents=false packs them all the same"
    )
    padded = dataclasses.replace(config, data=dataclasses.replace(data, packing=False))
    return padded, [remark]
