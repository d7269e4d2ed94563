"""``--dry-run``: the plan of a run, derived values included."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch import run_folder
from launch.validation import Run, complete_section, settle
from trainer.config import PeftConfig, RunConfig, grad_accum_steps
from trainer.errors import DataError

Row = tuple[str, str]


def show(run: Run, console: Console | None = None) -> None:
    """Print the plan of ``run``.

    Raises:
        ConfigError: when the batch does not divide, or the run folder holds another run.
    """
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in plan(run):
        table.add_row(name, value)
    (console or Console(width=100, highlight=False, markup=False)).print(table)


def plan(run: Run) -> list[Row]:
    """Return what a run will do as (name, value) rows."""
    try:
        run, remarks = settle(run)
    except DataError as error:
        remarks = [f"not prepared yet: {error}"]
    config = run.config
    rows = [("run", config.name), ("folder", _folder_state(config)), ("stage", _fields(run))]
    if run.stage.single_process:
        return [*rows, ("processes", "1: this stage uses no ranks")]
    rows += _model(config) + _batch(config) + _rhythm(config) + _sources(config)
    return rows + list(_first_named("remarks", remarks))


def _folder_state(config: RunConfig) -> str:
    """Return the run folder and whether a run there would be resumed."""
    run_dir = Path(config.run_dir)
    if not (run_dir / run_folder.CONFIG_FILE).exists():
        return f"{run_dir} (new)"
    changes = run_folder.check_same_run(run_dir, config, complete_section)
    changed = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changes.items())
    return f"{run_dir} (exists: this would resume it{'; changed: ' if changed else ''}{changed})"


def _fields(run: Run) -> str:
    section = dict(run.config.stage)
    name = section.pop("name")
    return " ".join([str(name), *(f"{key}={value}" for key, value in section.items())])


def _model(config: RunConfig) -> list[Row]:
    engine, peft = config.engine, config.peft
    offload = [
        f"{what} on {place}"
        for what, place in (
            ("optimizer", engine.offload_optimizer),
            ("parameters", engine.offload_params),
        )
        if place != "none"
    ]
    precision = "auto (bf16 where the device computes it natively)"
    return [
        ("model", f"{config.model.name}: {config.model.path or 'from scratch'}"),
        ("tokenizer", config.tokenizer.path or "the model folder's own"),
        ("trained", _trained(peft)),
        ("engine", ", ".join([f"ZeRO-{engine.zero_stage}", *offload])),
        ("precision", precision if engine.precision == "auto" else engine.precision),
    ]


def _trained(peft: PeftConfig) -> str:
    """Return which parameters the run trains."""
    if peft.mode == "full":
        return "every parameter"
    if peft.mode == "freeze":
        last = f"the last {peft.trainable_layers} layers" if peft.trainable_layers else None
        return f"freeze, trains {' and '.join(filter(None, (peft.trainable, last)))}"
    words = f"lora, rank {peft.rank}" if peft.adapter is None else f"the adapter {peft.adapter}"
    return f"{words}, on a base in {peft.quantization}" if peft.mode == "qlora" else words


def _batch(config: RunConfig) -> list[Row]:
    loop, cluster, max_length = config.loop, config.cluster, config.data.max_length
    world_size = cluster.nodes * cluster.gpus_per_node
    num_micro = grad_accum_steps(config, world_size)
    length = f"{loop.max_steps:,} steps"
    if config.data.content == "prompts":
        step = f"prompts of at most {max_length} tokens, answered and scored by {world_size} ranks"
    else:
        length += f" = {loop.max_steps * loop.global_batch_tokens:,} tokens"
        step = (
            f"{loop.global_batch_tokens:,} tokens = {loop.global_batch_tokens // max_length} rows "
            f"of {max_length} = {world_size} ranks x {num_micro} micro-batches "
            f"x {loop.micro_batch_size} rows"
        )
    if loop.epochs is not None:
        steps = length if loop.max_steps else "as many steps as the prepared data takes"
        length = f"{loop.epochs:g} epochs: {steps}"
    return [
        ("world size", f"{world_size} = {cluster.nodes} nodes x {cluster.gpus_per_node} ranks"),
        ("step", step),
        ("length", length),
    ]


def _rhythm(config: RunConfig) -> list[Row]:
    loop, schedule, optim = config.loop, config.schedule, config.optim
    shape = f"{schedule.name}, peak {optim.lr:g}, {schedule.warmup_steps} steps of warm-up"
    if schedule.warmup_share:
        shape += f" or {schedule.warmup_share:.0%} of the run if that is more"
    if schedule.name == "wsd":
        last = f"{round(schedule.decay_share * loop.max_steps)} steps"
        shape += (
            f", decay over the last {last if loop.max_steps else f'{schedule.decay_share:.0%}'}"
        )
    if schedule.name != "constant":
        shape += f", down to {optim.lr * schedule.min_lr_ratio:g}"
    kept = f"the newest {loop.keep_last} kept"
    if loop.keep_every:
        kept += f" and every {loop.keep_every}th step"
    return [
        ("learning rate", shape),
        (
            "evaluation",
            f"{_times(loop.eval_every, loop.max_steps)}, {loop.eval_chars:,} characters a source",
        ),
        ("checkpoints", f"{_times(loop.save_every, loop.max_steps)}, {kept}"),
    ]


def _times(every: int, max_steps: int) -> str:
    if not every:
        return "at the end"
    return f"every {every} steps" + (f" ({-(-max_steps // every)} times)" if max_steps else "")


def _sources(config: RunConfig) -> list[Row]:
    sources = config.data.sources
    total = sum(source.weight for source in sources.values()) or 1.0
    by_pass = config.data.weights_are == "epochs"
    lines = (
        f"{f'{source.weight:g} x' if by_pass else f'{100 * source.weight / total:5.1f} %'} {name}: "
        f"{', '.join(source.paths)}"
        for name, source in sources.items()
    )
    return list(_first_named("data", lines)) or [("data", "no source")]


def _first_named(name: str, lines: Iterable[str]) -> Iterable[Row]:
    for index, line in enumerate(lines):
        yield (name if index == 0 else "", line)
