"""Our stages in turns: their config, and a rank that runs one of them."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from benchmarks.inputs.chat_inputs import CUTOFF, TEMPLATE
from benchmarks.inputs.turns import Turns

if TYPE_CHECKING:
    import torch

    from trainer.data.batches.collate import Batch
    from trainer.engine.engine import Engine
    from trainer.stage import Context

S = TypeVar("S")
ROW = 2 * CUTOFF  # tokens: any pair fits


def common_overrides(case: dict[str, Any], run_dir: Path) -> list[str]:
    """Return ``kuroshio run``'s overrides that all stages share here."""
    return [
        f"stage={case['stage']}",
        f"data.store_dir='{run_dir.parent / 'store'}'",
        "data.holdout_share=0",
        f"data.template={TEMPLATE}",
        "model=folder",
        f"model.path='{case['model']}'",
        f"engine={case['engine']}",
        f"engine.precision={case['precision']}",
        "loop.eval_chars=0",
        "loop.epochs=null",
        "loop.max_steps=1000000",
        "schedule.warmup_share=0",  # as the others' default
        "optim.lr=2e-5",
        f"run_dir='{run_dir}'",
    ]


def pair_values(case: dict[str, Any], run_dir: Path, own: Sequence[str]) -> dict[str, Any]:
    """Return the config of a stage on pairs whose step is about once all of them.

    The pairs are prepared here, since how many rows they fill is known only then.
    """
    from launch.compose import compose_values
    from trainer.config import load_config
    from trainer.data.batches.loader import make_rows
    from trainer.data.prepared.prepare import ensure_prepared, open_store

    micro_batch_size = case["micro_batch_size"]
    overrides = [
        *common_overrides(case, run_dir),
        f"+data.sources.pairs.paths=['{case['pairs']}']",
        f"data.max_length={ROW}",
        f"loop.micro_batch_size={micro_batch_size}",
        *own,
    ]
    config = load_config(compose_values(overrides))
    ensure_prepared(config.data, Path(case["model"]))
    store = open_store(config.data, case["model"])
    rows = make_rows(store, config.data, config.loop.seed)["pairs"].rows_per_epoch
    rows = math.ceil(rows / micro_batch_size) * micro_batch_size
    return compose_values([*overrides, f"loop.global_batch_tokens={rows * ROW}"])


def rank_command(script: str, values: dict[str, Any]) -> list[str]:
    """Return the command that runs ``script`` as a rank with this config."""
    return [sys.executable, script, "--rank", json.dumps({"values": values})]


def start_rank(case: dict[str, Any]) -> tuple[Context, Any]:
    """Join the group; return the context and the device of this rank."""
    from trainer.config import load_config
    from trainer.engine.engine import init_distributed
    from trainer.stage import Context

    config = load_config(case["values"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = init_distributed(rank, config.cluster.timeout_s)
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    return Context(config, run_dir, rank, world_size, rank), device


def make_stage(cls: type[S], context: Context) -> S:
    """Return a stage of a class from the config's ``stage`` section.

    Raises:
        ConfigError: the section has a problem.
    """
    from trainer.config import build
    from trainer.errors import ConfigError

    problems: list[str] = []
    fields = {key: value for key, value in context.config.stage.items() if key != "name"}
    stage = build(cls, fields, "stage", problems)
    if stage is None or problems:
        raise ConfigError("\n".join(problems))
    return stage


def facts_of(context: Context, engine: Engine, device: Any) -> dict[str, Any]:
    """Return what is reported beside the figures."""
    from trainer.engine.engine import choose_precision

    journal = (context.run_dir / "metrics.jsonl").read_text().splitlines()
    last = json.loads(journal[-1])
    return {
        "loss": last.get("loss"),
        "num_params": sum(parameter.numel() for parameter in engine.module.parameters()),
        "precision": choose_precision(context.config.engine.precision),
        "device": device.type,
    }


def run_pairs_in_turns(stage_class: type[Any], case: dict[str, Any]) -> None:
    """Run a stage on pairs under the real loop until the parent has seen enough.

    Args:
        stage_class: of the stage.
        case: what ``rank_command`` was given.
    """

    class TurnByTurn(stage_class):  # type: ignore[misc]
        def train_step(self, step: int, batches: Iterator[Batch]) -> int:
            turns.begin_step(step, lambda: facts_of(context, self.policy, device))
            return int(super().train_step(step, batches))

        def loss(self, batch: Batch) -> torch.Tensor:
            assert batch.examples is not None
            turns.tokens += batch.num_tokens
            turns.targets += batch.examples.num_pairs
            loss: torch.Tensor = super().loss(batch)
            return loss

    context, device = start_rank(case)
    turns = Turns(1, device)
    make_stage(TurnByTurn, context).run(context)
