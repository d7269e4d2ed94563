"""Log-probabilities under the model that a policy started from, by one of three ways."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import PeftConfig, RunConfig
from trainer.data.batches.collate import Batch
from trainer.data.batches.mismatched import MismatchedAnswers
from trainer.data.prepared.store import TokenStore
from trainer.engine.collectives import any_over_ranks
from trainer.engine.engine import Engine
from trainer.inputs import describe_inputs
from trainer.reference_cache import COLUMNS, Job, ReferenceCache
from trainer.sequence_logps import TokenLogps, sum_over_sequences
from trainer.stage import Context

LOG = logging.getLogger(__name__)

# auto: adapter_off where adapters are trained, else cached
ReferenceKind = Literal["auto", "cached", "adapter_off", "streaming"]


class Reference(Protocol):
    """What a frozen model says of the answers of a batch."""

    def logps(self, batch: Batch) -> Tensor:
        """Return each example's log-probability, summed over its answer. -> [n] nats"""


class CachedReference:
    """Reads what was computed before the first step.

    Args:
        tables: of the store's sources, in its order: ``[documents, columns]``.
        device: of the result.
    """

    def __init__(self, tables: Sequence[NDArray[np.float32]], device: torch.device) -> None:
        self._tables, self._device = list(tables), device

    def logps(self, batch: Batch) -> Tensor:
        """Return each example's log-probability. -> [n] nats"""
        examples = batch.examples
        assert examples is not None
        places = zip(
            batch.source_ids[examples.rows].tolist(),
            examples.documents.tolist(),
            examples.sides.tolist(),
            strict=True,
        )
        values = [
            self._tables[source][document, COLUMNS[side]] for source, document, side in places
        ]
        return torch.tensor(np.array(values, np.float32)).to(self._device, non_blocking=True)


class ComputedReference:
    """Asks the frozen model at every step.

    Args:
        engine: around a ``PreferencePolicy`` that has a reference.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @torch.no_grad()
    def logps(self, batch: Batch) -> Tensor:
        """Return each example's log-probability. -> [n] nats"""
        return sum_over_sequences(
            batch, logps_of(self._engine, "reference"), self._engine.device
        ).sums


def choose_reference(asked: ReferenceKind, peft: PeftConfig) -> ReferenceKind:
    """Return the way that ``auto`` stands for; others stay."""
    if asked != "auto":
        return asked
    return "cached" if why_not_adapter_off(peft) else "adapter_off"


def why_not_adapter_off(peft: PeftConfig) -> str | None:
    """Return why switching the adapter off would not give the model that training starts from."""
    if peft.mode not in ("lora", "qlora"):
        return f"peft.mode={peft.mode} trains no adapter"
    if peft.train_embeddings:
        return "peft.train_embeddings=true changes what is beneath the adapter"
    return None


def open_caches(
    context: Context,
    store: TokenStore,
    engine: Engine,
    mismatched: bool,
) -> tuple[CachedReference, dict[str, Any]]:
    """Return the reference log-probabilities of all documents, computing those that are not there.

    The engine must hold the weights that training starts from.

    Args:
        context: config and rank.
        store: the run's prepared sources.
        engine: around the policy.
        mismatched: also of KTO's mismatched answers.

    Returns:
        The reference, and figures on how it came about.

    Raises:
        DataError: what is there is damaged or not of this run's rows and model.
    """
    config, began = context.config, time.monotonic()
    identity = _identify(config, store, engine.precision)
    tables, computed = [], []
    for name, source in store.sources.items():
        third = MismatchedAnswers(
            [source],
            max_length=config.data.max_length,
            packing=config.data.packing,
            pad_token_id=store.pad_token_id,
        )
        job = Job(
            source=source,
            pad_token_id=store.pad_token_id,
            max_length=config.data.max_length,
            packing=config.data.packing and config.data.isolate_documents,
            micro_batch_size=config.loop.micro_batch_size,
            mismatched=third if mismatched else None,
        )
        cache = ReferenceCache(Path(config.data.store_dir), job, identity)
        if any_over_ranks(not cache.is_complete()):
            _compute(cache, engine, context)
            computed.append(name)
        else:
            with torch.no_grad():
                cache.check(logps_of(engine, "actor"), engine.device, engine.precision)
        tables.append(cache.open())
    figures = {"computed": computed, "seconds": round(time.monotonic() - began, 3)}
    return CachedReference(tables, engine.device), figures


@torch.no_grad()
def _compute(cache: ReferenceCache, engine: Engine, context: Context) -> None:
    LOG.info("computing reference log-probabilities into %s", cache.folder)
    engine.module.eval()
    cache.compute(logps_of(engine, "actor"), engine.device, context.rank, context.world_size)
    engine.module.train()


def logps_of(engine: Engine, part: Literal["actor", "reference"]) -> TokenLogps:
    """Return the function that gives the log-probability of each target under a part."""
    return lambda **inputs: engine(part=part, output="logps", **inputs)


def _identify(config: RunConfig, store: TokenStore, precision: str) -> dict[str, Any]:
    """Return what changes a model's numbers on given rows; the rows' store says the rest."""
    inputs, peft = describe_inputs(config, store), config.peft
    return {
        "model": inputs["model.path"],
        "adapter": inputs.get("peft.adapter"),
        "quantization": peft.quantization if peft.mode == "qlora" else None,
        "precision": precision,
        "max_length": config.data.max_length,
    }
