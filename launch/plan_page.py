"""A plan as tables in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from rich.console import Console
from rich.table import Table

from trainer.plan.memory import EnginePlan
from trainer.plan.occupancy import host_peak
from trainer.plan.search import Search
from trainer.plan.work import GB, RunPlan

Row = tuple[str, str]
# Of the table of --fit: nodes x GPUs, rows at once, largest GB on a GPU and a node, ...
COLUMNS = (
    "GPUs",
    "engine",
    "rows",
    "GPU GB",
    "node GB",
    "step s",
    "hours",
    "jobs",
    "GPU-h",
    "price",
)


def show_plan(plan: RunPlan, console: Console) -> None:
    """Print a plan."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in describe(plan):
        table.add_row(name, value)
    console.print(table)


def show_search(found: Search, console: Console, max_rows: int) -> None:
    """Print what fits, the cheapest first, and why the rest does not."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "engine" else "right", no_wrap=True)
    for plan in found.fitting[:max_rows]:
        table.add_row(*_search_cells(plan))
    shown = min(max_rows, len(found.fitting))
    console.print(
        f"{len(found.fitting)} ways fit, of {found.num_tried} tried; {shown} cheapest:"
        if found.fitting
        else f"nothing fits, of {found.num_tried} tried"
    )
    if found.fitting:
        console.print(table)
    if found.refused:
        console.print(f"\nnever fit ({len(found.refused)} kinds), by what comes nearest:")
    for refusal in found.refused[:max_rows]:
        engine = show_engine(refusal.engine)
        console.print(f"  {engine}, {_nodes(refusal.nodes)}: {refusal.reason}")


def show_engine(engine: EnginePlan | RunPlan) -> str:
    """Return ZeRO stage, offload and recomputation in a few words."""
    words = f"ZeRO-{engine.zero_stage}"
    if engine.offload_params != "none":
        words += f" all on {engine.offload_params}"
    elif engine.offload_optimizer != "none":
        words += f" optimizer on {engine.offload_optimizer}"
    return words + (", recomputing" if engine.activation_checkpointing else "")


def _search_cells(plan: RunPlan) -> list[str]:
    def show(value: float | None, form: str) -> str:
        return "?" if value is None else format(value, form)

    cost = plan.costs[0] if plan.costs else None
    return [
        f"{plan.nodes} x {plan.gpus_per_node}",
        show_engine(plan),
        str(plan.micro_batch_size),
        f"{plan.peak_bytes / GB:.1f}",
        f"{host_peak(plan.host) / GB:.0f}",
        show(plan.step_seconds, ".2f"),
        show(plan.hours, ",.1f"),
        show(plan.num_jobs, "d"),
        show(plan.gpu_hours, ",.0f"),
        "?" if cost is None else f"{cost.currency} {cost.amount:,.0f}",
    ]


def show_remarks(remarks: Iterable[str], console: Console) -> None:
    """Print what is assumed or unknown."""
    for remark in dict.fromkeys(remarks):
        console.print(f"assumed: {remark}", soft_wrap=True)


def describe(plan: RunPlan) -> list[Row]:
    """Return a plan as (name, value) rows."""
    return [
        *_who(plan),
        *_gpu(plan),
        *_host(plan),
        *_disk(plan),
        *_time(plan),
        *_cost(plan),
        *(("does not fit" if index == 0 else "", text) for index, text in enumerate(plan.problems)),
        *(("assumed" if index == 0 else "", text) for index, text in enumerate(plan.remarks)),
    ]


def show_gb(size: float) -> str:
    """Return bytes as GB of 10^9 bytes, or as MB."""
    if size < 0.1 * GB:
        return f"{size / 1e6:,.1f} MB"
    return f"{size / GB:,.2f} GB" if size < 10 * GB else f"{size / GB:,.1f} GB"


def show_hours(hours: float) -> str:
    """Return hours as one would say them."""
    if hours < 1:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 100 else f"{hours:,.0f} h ({hours / 24:.1f} days)"


def _who(plan: RunPlan) -> Iterator[Row]:
    gpu = plan.gpu or "of an unknown kind"
    yield "run", f"{plan.stage} on {plan.machine}: {_gpus(plan)} {gpu}"
    engine = f"ZeRO-{plan.zero_stage}, {plan.precision}"
    if plan.offload_optimizer != "none":
        engine += f", optimizer on {plan.offload_optimizer}"
    if plan.offload_params != "none":
        engine += f", parameters on {plan.offload_params}"
    engine += ", activations computed again" if plan.activation_checkpointing else ""
    yield (
        "engine",
        f"{engine}, {plan.micro_batch_size} row{'s' if plan.micro_batch_size > 1 else ''} at once",
    )
    for role, kinds in plan.parameters.items():
        parts = ", ".join(f"{kind} {number:,}" for kind, number in kinds.items())
        yield role, f"{sum(kinds.values()):,} parameters: {parts}"
    yield "trained", f"{plan.trained_parameters:,} parameters"


def _gpus(plan: RunPlan) -> str:
    return f"{plan.num_gpus} GPUs ({_nodes(plan.nodes)} x {plan.gpus_per_node})"


def _nodes(number: int) -> str:
    return f"{number} node{'s' if number > 1 else ''}"


def _gpu(plan: RunPlan) -> Iterator[Row]:
    limit = "unknown size" if plan.gpu_bytes is None else f"{plan.gpu_bytes / GB:g} GB"
    yield "each GPU", f"{show_gb(plan.peak_bytes)} at most, of {limit}"
    yield from _parts(plan.memory)


def _parts(parts: Mapping[str, float]) -> Iterator[Row]:
    for name, size in parts.items():
        if size >= 1e6:
            yield "", f"{show_gb(size):>12}  {name}"


def _host(plan: RunPlan) -> Iterator[Row]:
    limit = "unknown" if plan.host_bytes is None else show_gb(plan.host_bytes)
    if plan.host:
        yield "each node", f"{show_gb(host_peak(plan.host))} of memory at most, of {limit}"
        yield from _parts(plan.host)
    if plan.nvme_bytes:
        yield "", f"{show_gb(plan.nvme_bytes):>12}  on its own disk"


def _disk(plan: RunPlan) -> Iterator[Row]:
    quota = "quota unknown" if plan.quota_bytes is None else f"quota {show_gb(plan.quota_bytes)}"
    one = show_gb(plan.checkpoint_bytes)
    yield "checkpoints", f"{one} each, {show_gb(plan.disk_bytes)} at most; {quota}"


def _time(plan: RunPlan) -> Iterator[Row]:
    yield "a GPU sends", f"{show_gb(plan.network_bytes)} a step"
    if plan.step_seconds is None:
        yield "a step", f"{plan.flops_per_step:.3g} FLOPs; its time is unknown"
        return
    parts = ", ".join(
        f"{name} {'unknown' if seconds is None else f'{seconds:.2f} s'}"
        for name, seconds in plan.step_parts.items()
    )
    yield "a step", f"{plan.step_seconds:.2f} s ({parts}), {plan.tokens_per_s:,.0f} tokens/s"
    if plan.hours is None:
        yield "all steps", "their number is unknown"
        return
    jobs = "jobs unknown: no time limit is known"
    if plan.num_jobs is not None and plan.limit_hours is not None:
        jobs = f"{plan.num_jobs} job{'s' if plan.num_jobs > 1 else ''} of {plan.limit_hours:g} h"
    yield "all steps", f"{plan.num_steps:,} in {show_hours(plan.hours)}: {jobs}"


def _cost(plan: RunPlan) -> Iterator[Row]:
    if plan.gpu_hours is None:
        return
    yield "GPU-hours", f"{plan.gpu_hours:,.1f}"
    for cost in plan.costs:
        source = ", ".join(filter(None, (cost.who, cost.source, cost.date)))
        yield "price", f"{cost.currency} {cost.amount:,.0f} ({source})"
    if not plan.costs:
        yield "price", "unknown: the profile has no price list (cluster.site.prices)"
