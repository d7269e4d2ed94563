"""A whole configuration, checked across its sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.config.build import build
from trainer.config.cluster import check_cluster
from trainer.config.schema import PeftConfig, RunConfig
from trainer.errors import ConfigError

# Smallest value of a key, where any number from there on makes sense.
LOWEST: dict[str, int] = {
    "model.pad_vocab_to": 1,
    "data.max_length": 2,
    "data.min_chars": 0,
    "data.num_processes": 0,
    "engine.initial_loss_scale_power": 0,
    "engine.loss_scale_window": 1,
    "engine.min_loss_scale": 1,
    "optim.lr": 0,
    "optim.weight_decay": 0,
    "optim.grad_clip": 0,
    "schedule.warmup_steps": 0,
    "peft.rank": 1,
    "peft.trainable_layers": 0,
    "loop.max_steps": 0,
    "loop.micro_batch_size": 1,
    "loop.global_batch_tokens": 2,
    "loop.log_every": 1,
    "loop.eval_every": 0,
    "loop.eval_chars": 0,
    "loop.save_every": 0,
    "loop.keep_last": 1,
    "loop.keep_every": 0,
    "loop.seed": 0,
    "guard.spike_factor": 1,
    "guard.spike_window": 4,
    "guard.max_skips": 1,
    "guard.skip_window": 1,
    "guard.max_roll_backs": 0,
    "guard.compare_every": 0,
    "cluster.nodes": 1,
    "cluster.gpus_per_node": 1,
    "cluster.timeout_s": 1,
    "cluster.max_lives": 1,
    "cluster.max_lives_without_progress": 1,
}


def load_config(values: Mapping[str, Any]) -> RunConfig:
    """Build and validate a whole run configuration from plain data.

    Raises:
        ConfigError: with every problem found, one per line.
    """
    problems: list[str] = []
    config = build(RunConfig, values, "", problems)
    if config is not None:
        problems += validate(config)
    if problems or config is None:
        raise ConfigError("\n".join(problems))
    return config


def validate(config: RunConfig) -> list[str]:
    """Return what contradicts itself across sections (world size is checked at rendezvous)."""
    engine, loop, data, problems = config.engine, config.loop, config.data, []
    if engine.offload_params != "none" and engine.zero_stage != 3:
        problems.append(
            f"engine.offload_params={engine.offload_params} needs ZeRO-3, but engine.zero_stage="
            f"{engine.zero_stage}; use engine=zero3_offload or engine.offload_params=none"
        )
    if engine.offload_optimizer != "none" and engine.zero_stage == 0:
        problems.append(
            f"engine.offload_optimizer={engine.offload_optimizer} needs ZeRO 1, 2 or 3, but "
            "engine.zero_stage=0; use engine=zero2_offload"
        )
    if engine.offload_optimizer == "nvme" and engine.zero_stage != 3:
        problems.append("engine.offload_optimizer=nvme needs ZeRO-3; use engine=zero3_nvme")
    if "nvme" in (engine.offload_optimizer, engine.offload_params) and not engine.nvme_path:
        problems.append("engine.nvme_path is null; nvme offload needs a node-local folder there")
    counts_rows = data.content != "prompts"
    if counts_rows and data.max_length > 1 and loop.global_batch_tokens % data.max_length:
        low = max(1, loop.global_batch_tokens // data.max_length) * data.max_length
        problems.append(
            f"loop.global_batch_tokens={loop.global_batch_tokens} is not a multiple of "
            f"data.max_length={data.max_length}; use {low} or {low + data.max_length}"
        )
    if loop.epochs is not None and loop.epochs <= 0:
        problems.append(f"loop.epochs={loop.epochs:g}: expected more than 0")
    if not loop.max_steps and loop.epochs is None:
        problems.append(
            "loop.max_steps=0 is as long as loop.epochs says, which is null; set one of the two"
        )
    problems += _check_guard(config)
    for key, low in LOWEST.items():
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        if value < low:
            problems.append(f"{key}={value}: expected {low} or more")
    problems += check_cluster(config)
    return problems + _check_peft(config.peft) + _check_shares(config)


def _check_guard(config: RunConfig) -> list[str]:
    """Return roll-backs that are asked for and cannot be."""
    guard, problems = config.guard, []
    for key in ("non_finite", "spikes"):
        if getattr(guard, key) != "roll_back":
            continue
        if not config.loop.save_every:
            problems.append(
                f"guard.{key}=roll_back needs checkpoints to go back to, but loop.save_every=0 "
                "saves at the end only; set it"
            )
        if not guard.max_roll_backs:
            problems.append(
                f"guard.{key}=roll_back, but guard.max_roll_backs=0 allows none; use "
                f"guard.{key}=stop or allow some"
            )
    return problems


def _check_peft(peft: PeftConfig) -> list[str]:
    """Return keys that the mode needs, and those it would not read."""
    problems = []
    if peft.mode == "freeze" and not (peft.trainable or peft.trainable_layers):
        problems.append(
            "peft.mode=freeze needs peft.trainable, a regex of parameter names to train, or "
            "peft.trainable_layers, a number of last layers"
        )
    unread: dict[tuple[str, ...], dict[str, Any]] = {
        ("freeze",): {"trainable": None, "trainable_layers": 0},
        ("lora", "qlora"): {
            "rslora": False,
            "dora": False,
            "b_lr_ratio": 1.0,
            "train_embeddings": False,
            "adapter": None,
        },
    }
    for modes, keys in unread.items():
        for key, unset in keys.items():
            value = getattr(peft, key)
            if peft.mode not in modes and value != unset:
                problems.append(
                    f"peft.{key}={value} has no effect with peft.mode={peft.mode}; use "
                    f"peft={'|'.join(modes)} or leave it out"
                )
    if peft.b_lr_ratio <= 0:
        problems.append(f"peft.b_lr_ratio={peft.b_lr_ratio}: expected more than 0")
    if peft.adapter and (peft.rslora or peft.dora):
        problems.append(
            f"peft.adapter={peft.adapter} itself says whether it is rsLoRA or DoRA; leave "
            "peft.rslora and peft.dora out"
        )
    return problems


def _check_shares(config: RunConfig) -> list[str]:
    """Return weights below 0 and shares outside 0..1."""
    data, optim, schedule = config.data, config.optim, config.schedule
    shares: dict[str, float | None] = {
        "data.holdout_share": data.holdout_share,
        "data.max_bad_row_share": data.max_bad_row_share,
        "schedule.min_lr_ratio": schedule.min_lr_ratio,
        "schedule.decay_share": schedule.decay_share,
        "schedule.warmup_share": schedule.warmup_share,
        "peft.dropout": config.peft.dropout,
    }
    problems = []
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        problems.append(f"optim.betas={optim.betas}: expected two numbers, 0 or more and below 1")
    if optim.eps <= 0:
        problems.append(f"optim.eps={optim.eps}: expected more than 0")
    for name, source in data.sources.items():
        shares[f"data.sources.{name}.holdout_share"] = source.holdout_share
        if source.weight < 0:
            problems.append(f"data.sources.{name}.weight={source.weight}: expected 0 or more")
    for key, share in shares.items():
        if share is not None and not 0 <= share <= 1:
            problems.append(f"{key}={share}: expected 0 to 1")
    return problems


def grad_accum_steps(config: RunConfig, world_size: int) -> int:
    """Return micro-batches per rank and optimizer step for ``world_size`` ranks.

    With prompts their number varies from step to step, and the engine is told of each: 1 here.

    Raises:
        ConfigError: when the global batch does not divide over the ranks.
    """
    if config.data.content == "prompts":
        return 1
    unit = config.loop.micro_batch_size * config.data.max_length * world_size
    steps, rest = divmod(config.loop.global_batch_tokens, unit)
    if rest or not steps:
        low = max(1, steps) * unit
        raise ConfigError(
            f"loop.global_batch_tokens={config.loop.global_batch_tokens} is not a multiple of "
            f"micro_batch_size*max_length*world_size={unit}; use {low} or {low + unit}. A run that "
            f"goes on must keep its global batch: use {_other_split(config, world_size)}"
        )
    return steps


def fit_micro_batch_size(num_rows: int, limit: int, world_size: int) -> int | None:
    """Return the most rows that a rank can hold at once so that a step divides over the ranks.

    Args:
        num_rows: of a step over all ranks.
        limit: rows that a rank has room for.
        world_size: number of ranks.

    Returns:
        At most ``limit``; None when ``num_rows`` does not divide over the ranks at all.
    """
    share, rest = divmod(num_rows, world_size)
    if rest or not share:
        return None
    return max(size for size in range(1, min(limit, share) + 1) if share % size == 0)


def _other_split(config: RunConfig, world_size: int) -> str:
    """Return what besides the global batch would make a step divide over the ranks."""
    num_rows = config.loop.global_batch_tokens // config.data.max_length
    size = fit_micro_batch_size(num_rows, config.loop.micro_batch_size, world_size)
    if size is not None:
        return f"loop.micro_batch_size={size}"
    fewer = max((n for n in range(1, world_size) if num_rows % n == 0), default=1)
    return f"{fewer} ranks, which divide its {num_rows} rows a step"
