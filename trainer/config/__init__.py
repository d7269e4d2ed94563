"""The configuration of a run: schema, building from plain data, checks across sections.

A run is described by plain data (nested dicts from YAML or JSON). All problems are reported at
once.
"""

from trainer.config.build import build, nearest
from trainer.config.schema import (
    ClusterConfig,
    DataConfig,
    EngineConfig,
    GuardConfig,
    LogConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    PartitionConfig,
    PeftConfig,
    PriceConfig,
    RunConfig,
    ScheduleConfig,
    SiteConfig,
    SourceConfig,
    TokenizerConfig,
)
from trainer.config.validate import (
    fit_micro_batch_size,
    grad_accum_steps,
    load_config,
    validate,
)

__all__ = [
    "ClusterConfig",
    "DataConfig",
    "EngineConfig",
    "GuardConfig",
    "LogConfig",
    "LoopConfig",
    "ModelConfig",
    "OptimConfig",
    "PartitionConfig",
    "PeftConfig",
    "PriceConfig",
    "RunConfig",
    "ScheduleConfig",
    "SiteConfig",
    "SourceConfig",
    "TokenizerConfig",
    "build",
    "fit_micro_batch_size",
    "grad_accum_steps",
    "load_config",
    "nearest",
    "validate",
]
