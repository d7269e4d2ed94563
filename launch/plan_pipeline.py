"""``kuroshio plan pipeline=NAME``: every step's plan, and what they come to together."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.graph.check import Values, compose_runs, hands_over, replaced
from launch.graph.definition import Pipeline, TokenizerOptions, read_pipeline
from launch.plan_models import num_ids, planned_architecture
from launch.plan_page import show_gb, show_hours, show_remarks
from launch.planning import plan_config
from trainer.config import RunConfig, load_config
from trainer.errors import ConfigError
from trainer.plan.work import GB, RunPlan

VOCAB = "vocab"


@dataclass(frozen=True)
class PipelinePlan:
    """The plans of a pipeline's runs by step, and their sums; None is unknown.

    Attributes:
        steps: of runs on GPUs.
        disk_bytes: of all checkpoints kept, and of the models between the steps in 16 bits.
        gpu_hours: of the steps whose hours are known.
        unknown: steps whose hours are not.
        longest_hours: of the longest chain of steps, without waiting for nodes.
        problems: why it cannot be as asked.
    """

    steps: Mapping[str, RunPlan]
    disk_bytes: float
    gpu_hours: float
    costs: Mapping[str, float]
    unknown: tuple[str, ...]
    longest_hours: float
    problems: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data for JSON."""
        steps = {name: plan.as_dict() for name, plan in self.steps.items()}
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "steps": steps}


def main(words: Sequence[str], as_json: bool, efficiency: float | None, console: Console) -> int:
    """Plan a pipeline; return the exit code (78: it cannot be)."""
    plan = plan_pipeline(read_pipeline(words), efficiency)
    if as_json:
        print(json.dumps(plan.as_dict(), ensure_ascii=False, indent=1))
    else:
        _show(plan, console)
    return ConfigError.exit_code if plan.problems else 0


def plan_pipeline(pipeline: Pipeline, efficiency: float | None = None) -> PipelinePlan:
    """Plan every run of a pipeline, also of models that no step has written yet.

    Raises:
        ConfigError: with every problem of every step's config.
    """
    composed = compose_runs(pipeline)
    plans: dict[str, RunPlan] = {}
    models = 0.0
    with tempfile.TemporaryDirectory(prefix="kuroshio-") as folder:
        places: dict[str, str] = {}
        for step in pipeline.steps.values():
            source = step.name if step.kind == "run" else next(iter(step.parents), "")
            if source not in composed:
                continue
            config = load_config(replaced(composed[source], places))
            architecture = _architecture(pipeline, config, composed[source])
            if step.kind == "run":
                plan = plan_config(_with_sizes(config, architecture), efficiency)
                plans |= {} if plan is None else {step.name: plan}
            target = hands_over(step, composed)
            if target is None:
                continue
            known = plans.get(source)
            models += _model_bytes(known)
            if not (Path(target) / "config.json").is_file():
                places[target] = _stand_in(Path(folder) / step.name, architecture)
    return _sum_up(pipeline, plans, models)


def _stand_in(place: Path, architecture: Mapping[str, Any]) -> str:
    """Write what the config.json of a model to come will say of its sizes; return its folder."""
    place.mkdir()
    (place / "config.json").write_text(json.dumps(architecture), encoding="utf-8")
    return str(place)


def _architecture(pipeline: Pipeline, config: RunConfig, values: Values) -> dict[str, Any]:
    """Return the architecture of the model that a run leaves behind."""
    made = {str(step.folder): step for step in pipeline.steps.values()}
    options = made[path].options if (path := values["tokenizer"]["path"]) in made else None
    if isinstance(options, TokenizerOptions) and config.model.architecture is not None:
        unit = config.model.pad_vocab_to
        rows = -(-options.vocab_size // unit) * unit
        return {"vocab_size": rows, **config.model.architecture}
    if config.stage["name"] != VOCAB:
        return planned_architecture(config)
    if config.model.path is None:
        return {}
    architecture = planned_architecture(config)
    unit = int(config.stage["pad_to_multiple"])
    rows = int(architecture["vocab_size"]) + _num_pieces(config.stage)
    return {**architecture, "vocab_size": -(-rows // unit) * unit}


def _num_pieces(stage: Mapping[str, Any]) -> int:
    """Return the pieces that a vocabulary gains at most: some of them it may have already."""
    asked = stage["vocab_size"]
    pieces = asked[0] if isinstance(asked, list) else asked
    if pieces is None and stage["pieces"]:
        pieces = num_ids(Path(stage["pieces"]))
    return int(pieces or 0) + len(stage["extra_pieces"])


def _with_sizes(config: RunConfig, architecture: dict[str, Any]) -> RunConfig:
    """Return a config whose new model has its vocabulary's rows."""
    if config.model.path is not None or config.stage["name"] == VOCAB:
        return config
    model = dataclasses.replace(config.model, architecture=architecture)
    return dataclasses.replace(config, model=model)


def _model_bytes(plan: RunPlan | None) -> float:
    """Return the bytes of the model that a step hands over, in 16 bits."""
    if plan is None:
        return 0.0
    return 2.0 * sum(next(iter(plan.parameters.values())).values())


def _sum_up(pipeline: Pipeline, plans: Mapping[str, RunPlan], models: float) -> PipelinePlan:
    costs: dict[str, float] = {}
    for plan in plans.values():
        for cost in plan.costs:
            name = f"{cost.currency} ({cost.who})"
            costs[name] = costs.get(name, 0.0) + cost.amount
    ends: dict[str, float] = {}
    for step in pipeline.steps.values():
        own = plans[step.name].hours if step.name in plans else 0.0
        ends[step.name] = max((ends[p] for p in step.parents), default=0.0) + (own or 0.0)
    disk = sum(plan.disk_bytes for plan in plans.values()) + models
    problems = [f"step {name}: {text}" for name, plan in plans.items() for text in plan.problems]
    quotas = [plan.quota_bytes for plan in plans.values() if plan.quota_bytes is not None]
    if quotas and disk > min(quotas):
        problems.append(
            f"all steps together leave {disk / GB:.0f} GB of checkpoints and models, more than "
            f"cluster.site.quota_gb={min(quotas) / GB:g}; lower loop.keep_last, or delete finished "
            "steps' checkpoints between the steps"
        )
    return PipelinePlan(
        steps=plans,
        disk_bytes=disk,
        gpu_hours=sum(plan.gpu_hours or 0.0 for plan in plans.values()),
        costs=costs,
        unknown=tuple(name for name, plan in plans.items() if plan.hours is None),
        longest_hours=max(ends.values(), default=0.0),
        problems=tuple(problems),
    )


def _show(plan: PipelinePlan, console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("step", "stage", "GPUs", "parameters", "GPU GB", "hours", "jobs", "GPU-h"):
        table.add_column(name, justify="left" if name in ("step", "stage") else "right")
    for name, own in plan.steps.items():
        table.add_row(
            name,
            own.stage,
            f"{own.nodes} x {own.gpus_per_node}",
            f"{sum(sum(kinds.values()) for kinds in own.parameters.values()):,}",
            f"{own.peak_bytes / GB:.1f}",
            "?" if own.hours is None else f"{own.hours:.1f}",
            "?" if own.num_jobs is None else str(own.num_jobs),
            "?" if own.gpu_hours is None else f"{own.gpu_hours:,.1f}",
        )
    console.print(table)
    console.print(f"\nall steps: {show_gb(plan.disk_bytes)} of checkpoints and models")
    known = f", without {', '.join(plan.unknown)}, whose hours are unknown" if plan.unknown else ""
    console.print(f"{plan.gpu_hours:,.1f} GPU-hours{known}", soft_wrap=True)
    console.print(f"longest chain of steps: {show_hours(plan.longest_hours)}, queues not counted")
    for name, amount in plan.costs.items():
        console.print(f"price: {name} {amount:,.0f}")
    show_remarks([remark for own in plan.steps.values() for remark in own.remarks], console)
    for problem in plan.problems:
        console.print(f"does not fit: {problem}", soft_wrap=True)
