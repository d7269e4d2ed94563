"""The audit as one self-contained HTML page, and as a table for the console."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from rich.table import Table

TEMPLATE_NAME = "audit.html.j2"
# Written by matplotlib, then replaced by CSS variables: one palette cannot suit light and dark.
STAND_INS = {
    "#010203": "var(--ink-soft)",
    "#010204": "var(--line)",
    "#010205": "var(--accent)",
    "#010206": "var(--second)",
}
INK, GRID, FIRST, SECOND = STAND_INS
MAX_TOKEN_CHARS = 24  # of one token in a side-by-side view


def render_page(audit: Mapping[str, Any], title: str, facts: Mapping[str, str]) -> str:
    """Return the page for an audit.

    Args:
        audit: from ``tokenizer.audit.audit``.
        title: heading.
        facts: label → value, shown under the heading (files, options).
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    environment.filters.update(number=show_number, token=show_token)
    template = environment.get_template(TEMPLATE_NAME)
    charts = draw_charts(audit["curve"]) if len(audit["curve"]) > 1 else []
    verdicts = judge(audit)
    return template.render(audit=audit, title=title, facts=facts, charts=charts, verdicts=verdicts)


def summarise(result: Mapping[str, Any]) -> Table:
    """Return the promises and the density per source as a table for the console."""
    drift, dead = result["drift"], result["dead"]
    title = (
        f"{result['base_ids']:,} + {result['new_ids'] - result['base_ids']:,} ids, "
        f"{dead['count']:,} dead, {drift['changed']:,} of {drift['lines']:,} other lines changed"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("tokens per character")
    for heading in ("before", "after", "per Han, before", "after", "slow ≠ fast"):
        table.add_column(heading, justify="right")
    for name, source in result["sources"].items():
        figures = [
            "-" if source[side][key] is None else f"{source[side][key]:.3f}"
            for key in ("tokens_per_character", "tokens_per_han")
            for side in ("before", "after")
        ]
        parity = result["parity"][name] if result["parity"] else None
        different = f"{parity['different']:,} of {parity['documents']:,}" if parity else "-"
        table.add_row(name, *figures, different)
    return table


def judge(audit: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the four promises of an extension with their counts, for the tiles."""
    drift, parity = audit["drift"], audit["parity"]
    sources = audit["sources"].values()
    failures = sum(source["after"]["round_trip_failures"] for source in sources)
    documents = sum(source["after"]["documents"] for source in sources)
    tiles = [
        ("Dead pieces", audit["dead"]["count"], f"of {audit['dead']['of']:,} new tokens"),
        ("Changed lines", drift["changed"], f"of {drift['lines']:,} without new scripts"),
        ("Round trip failures", failures, f"of {documents:,} texts"),
    ]
    if parity is not None:
        different = sum(source["different"] for source in parity.values())
        tiles.insert(2, ("Slow ≠ fast", different, f"of {documents:,} texts"))
    return [{"label": name, "count": count, "of": of} for name, count, of in tiles]


def show_number(value: float | None) -> str:
    """Return a count with separators, a ratio with three digits, a dash for nothing."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def show_token(token: str) -> str:
    """Return a token with line ends and tabs made visible, cut when it is long."""
    text = token.replace("\n", "⏎").replace("\t", "⇥")
    return text if len(text) <= MAX_TOKEN_CHARS else text[:MAX_TOKEN_CHARS] + "…"


def draw_charts(curve: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return two charts over the vocabulary size: tokens, and training FLOPs, per character."""
    ids = [point["ids"] for point in curve]
    tokens = [point["tokens_per_character"] for point in curve]
    layers = [point["layer_flops_per_character"] for point in curve]
    total = [a + p["head_flops_per_character"] for a, p in zip(layers, curve, strict=True)]
    return [
        {"title": "Tokens per character", "svg": _draw("tokens", ids, [tokens]), "legend": ""},
        {
            "title": "Training FLOPs per character",
            "svg": _draw("flops", ids, [total, layers]),
            "legend": "whole model|layers alone",
        },
    ]


def _draw(name: str, ids: Sequence[int], lines: Sequence[Sequence[float]]) -> str:
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 9,
        **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
        "axes.labelcolor": INK,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.6, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for line, colour in zip(lines, (FIRST, SECOND), strict=False):
            axes.plot(ids, line, color=colour, marker="o", markersize=4, linewidth=1.7)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", length=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("vocabulary size (ids)")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if max(lines[0]) > 1000:
            axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for stand_in, variable in STAND_INS.items():
        svg = svg.replace(stand_in, variable)
    return svg
