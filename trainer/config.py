"""The schema of the configuration's fixed groups.

A run is described by plain data (nested dicts from YAML or JSON). ``build`` turns one section into
its dataclass and collects every unknown key and wrong type; ``validate`` checks across sections.
All problems are reported at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, Union

from trainer.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class ModelConfig:
    """A model folder, or an architecture to start from scratch (exactly one of the two)."""

    name: str
    path: str | None = None
    architecture: dict[str, Any] | None = None  # keyword arguments of the transformers config class
    pad_vocab_to: int = 64  # from scratch: rows of both vocabulary matrices are a multiple of this


@dataclass(frozen=True)
class TokenizerConfig:
    """A tokenizer folder or SentencePiece ``.model``; null means the model folder's own."""

    path: str | None = None


@dataclass(frozen=True)
class SourceConfig:
    """One data source: files, how to read them, how often to draw from it."""

    paths: list[str]  # files, folders or globs
    weight: float = 1.0  # relative share of training rows
    format: str = "auto"  # auto | txt | lines | jsonl | json | csv | tsv | parquet | arrow
    text_columns: list[str] = field(default_factory=lambda: ["text"])  # joined by a newline
    holdout_share: float | None = None  # share of documents held out; null = data.holdout_share


@dataclass(frozen=True)
class DataConfig:
    """Sources and how documents become training rows."""

    sources: dict[str, SourceConfig]
    store_dir: str = "runs/store"  # prepared token stores, one folder per content key
    max_length: int = 512  # tokens a row
    packing: bool = True  # false: one document piece a row, padded
    isolate_documents: bool = True  # packed documents do not attend to each other
    holdout_share: float = 0.01
    min_chars: int = 1  # shorter documents are counted and left out
    max_bad_row_share: float = 0.01  # abort above this share of rejected rows
    num_processes: int = 0  # prepare: 0 = one per CPU core


@dataclass(frozen=True)
class EngineConfig:
    """DeepSpeed ZeRO, offload and precision."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    offload_params: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None  # node-local folder for nvme offload
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    activation_checkpointing: bool = False
    compile: bool = False
    initial_loss_scale_power: int = 16  # fp16: first loss scale is 2**this
    loss_scale_window: int = 1000  # fp16: steps without overflow before the scale doubles
    min_loss_scale: int = 1  # fp16: stop when overflows have pushed the scale down to this


@dataclass(frozen=True)
class OptimConfig:
    """AdamW; norms, biases and other one-dimensional parameters get no weight decay."""

    lr: float = 3e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0  # 0 = off


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning-rate schedule as a factor of ``optim.lr``."""

    name: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1
    decay_share: float = 0.2  # wsd: last share of the steps that decays


@dataclass(frozen=True)
class PeftConfig:
    """Which parameters are trained."""

    mode: Literal["full", "freeze", "lora"] = "full"
    trainable: str | None = None  # freeze: regex searched in parameter names
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    train_embeddings: bool = False  # lora: train input and output embeddings as well


@dataclass(frozen=True)
class LoopConfig:
    """Length and rhythm of a run."""

    max_steps: int = 100
    micro_batch_size: int = 1  # rows a rank holds at once
    global_batch_tokens: int = 8192  # tokens of one optimizer step over all ranks
    log_every: int = 1
    eval_every: int = 0  # 0 = at the end only
    eval_chars: int = 100_000  # per source, at most; 0 = no evaluation
    save_every: int = 0  # 0 = at the end only
    keep_last: int = 2  # checkpoints kept, newest first
    keep_every: int = 0  # steps; checkpoints at multiples are never deleted (0 = none)
    seed: int = 0


@dataclass(frozen=True)
class LogConfig:
    """Where metrics go besides ``metrics.jsonl`` and the console."""

    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "kuroshio"
    tensorboard: bool = False


@dataclass(frozen=True)
class ClusterConfig:
    """Machines of a run."""

    nodes: int = 1
    gpus_per_node: int = 1  # ranks a node; on a CPU machine, processes
    timeout_s: int = 1800  # collective timeout


@dataclass(frozen=True)
class RunConfig:
    """A whole run. ``stage`` stays plain data: the stage's own dataclass reads it."""

    name: str
    run_dir: str
    stage: dict[str, Any]
    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    engine: EngineConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    peft: PeftConfig
    loop: LoopConfig
    log: LogConfig
    cluster: ClusterConfig


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
    "loop.max_steps": 1,
    "loop.micro_batch_size": 1,
    "loop.global_batch_tokens": 2,
    "loop.log_every": 1,
    "loop.eval_every": 0,
    "loop.eval_chars": 0,
    "loop.save_every": 0,
    "loop.keep_last": 1,
    "loop.keep_every": 0,
    "loop.seed": 0,
    "cluster.nodes": 1,
    "cluster.gpus_per_node": 1,
    "cluster.timeout_s": 1,
}


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """Return ``; did you mean a, b?`` for the known words closest to ``word``, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


def build(cls: type[T], values: Mapping[str, Any], where: str, problems: list[str]) -> T | None:
    """Build dataclass ``cls`` from plain ``values``; append what is wrong to ``problems``.

    Args:
        cls: a dataclass type.
        values: the section as nested dicts.
        where: dotted key of the section, for messages.
        problems: list that messages are appended to.

    Returns:
        The instance, or None if this section had a problem.
    """
    before = len(problems)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in fields:
            problems.append(f"{prefix}{key} is not a known key{nearest(str(key), fields)}")
    kwargs = {}
    for key, spec in fields.items():
        if key in values:
            kwargs[key] = _convert(values[key], hints[key], f"{prefix}{key}", problems)
        elif spec.default is spec.default_factory is dataclasses.MISSING:
            problems.append(f"{prefix}{key} is missing; give it a value")
    return cls(**kwargs) if len(problems) == before else None


def _convert(value: Any, hint: Any, where: str, problems: list[str]) -> Any:
    """Check ``value`` against the type ``hint``; convert nested sections and int → float."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(typing.cast(type, hint), value, where, problems)
    if origin in (Union, types.UnionType):
        trials: list[list[str]] = []
        for option in args:
            trials.append([])
            result = _convert(value, option, where, trials[-1])
            if not trials[-1]:
                return result
        problems.append(min(trials, key=len)[0])
        return None
    if origin is Literal:
        if value in args and not isinstance(value, bool):
            return value
        expected = "|".join(map(str, args))
        problems.append(
            f"{where}={value!r}: expected {expected}{nearest(str(value), map(str, args))}"
        )
        return None
    if origin is list and isinstance(value, (list, tuple)):
        return [_convert(v, args[0], f"{where}[{i}]", problems) for i, v in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {str(k): _convert(v, args[1], f"{where}.{k}", problems) for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = origin or hint
    if isinstance(value, plain) and not (isinstance(value, bool) and plain is not bool):
        return value
    name = "null" if plain is type(None) else plain.__name__
    problems.append(f"{where}={value!r}: expected {name}, got {type(value).__name__}")
    return None


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
    if config.peft.mode == "freeze" and not config.peft.trainable:
        problems.append(
            "peft.mode=freeze needs peft.trainable, a regex of parameter names to train"
        )
    if data.max_length > 1 and loop.global_batch_tokens % data.max_length:
        low = max(1, loop.global_batch_tokens // data.max_length) * data.max_length
        problems.append(
            f"loop.global_batch_tokens={loop.global_batch_tokens} is not a multiple of "
            f"data.max_length={data.max_length}; use {low} or {low + data.max_length}"
        )
    for key, low in LOWEST.items():
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        if value < low:
            problems.append(f"{key}={value}: expected {low} or more")
    return problems + _check_shares(config)


def _check_shares(config: RunConfig) -> list[str]:
    """Return weights below 0 and shares outside 0..1."""
    data, optim, schedule = config.data, config.optim, config.schedule
    shares: dict[str, float | None] = {
        "data.holdout_share": data.holdout_share,
        "data.max_bad_row_share": data.max_bad_row_share,
        "schedule.min_lr_ratio": schedule.min_lr_ratio,
        "schedule.decay_share": schedule.decay_share,
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

    Raises:
        ConfigError: when the global batch does not divide over the ranks.
    """
    unit = config.loop.micro_batch_size * config.data.max_length * world_size
    steps, rest = divmod(config.loop.global_batch_tokens, unit)
    if rest or not steps:
        low = max(1, steps) * unit
        raise ConfigError(
            f"loop.global_batch_tokens={config.loop.global_batch_tokens} is not a multiple of "
            f"micro_batch_size*max_length*world_size={unit}; use {low} or {low + unit}"
        )
    return steps
