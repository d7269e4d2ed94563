"""Charts as SVG that a page can colour: light and dark come from its CSS variables."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)

# Written by matplotlib and then replaced: no palette can suit a light and a dark page at once.
INK, GRID = "#010203", "#010204"
NUM_COLOURS = 8
COLOURS = [f"#0102{16 + index:02x}" for index in range(NUM_COLOURS)]
DASHES = ["-", (0, (5, 2)), (0, (1.5, 1.5))]  # tell apart more curves than there are colours
MAX_POINTS = 800  # a curve in a 400-pixel chart cannot show more


# plain figures, counts with k and M, shares as per cent, or a logarithmic axis
Axis = Literal["plain", "count", "percent", "log"]


@dataclass(frozen=True)
class Curve:
    """A curve: finite ``values`` at ``steps``."""

    steps: Sequence[int]
    values: Sequence[float]
    marked: bool = False  # show each point
    faint: bool = False  # lies behind a smoothed one
    colour: int = 0


@dataclass(frozen=True)
class Mark:
    """A step at which something happened, drawn as a line from top to bottom."""

    step: int
    colour: int


def smooth(values: Sequence[float]) -> list[float]:
    """Return the mean over a centred window of about a thirtieth of the values.

    Centred, because an average of the past lags behind a falling loss.
    """
    sums = list(accumulate(values, initial=0.0))
    reach = len(values) // 60
    result = []
    for index in range(len(values)):
        low, high = max(0, index - reach), min(len(values), index + reach + 1)
        result.append((sums[high] - sums[low]) / (high - low))
    return result


def thin(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Keep the lowest and the highest point of each stretch, so that spikes stay visible."""
    if len(steps) <= MAX_POINTS:
        return list(steps), list(values)
    stretch = math.ceil(2 * len(steps) / MAX_POINTS)
    kept: set[int] = {0, len(steps) - 1}
    for start in range(0, len(steps), stretch):
        indices = range(start, min(start + stretch, len(steps)))
        kept.add(min(indices, key=values.__getitem__))
        kept.add(max(indices, key=values.__getitem__))
    order = sorted(kept)
    return [steps[i] for i in order], [values[i] for i in order]


def draw_chart(
    name: str, curves: Sequence[Curve], axis: Axis = "plain", marks: Sequence[Mark] = ()
) -> str:
    """Return one chart over steps as an ``<svg>`` element, 4 × 2.2 inches before scaling.

    Args:
        name: of the chart, unique on its page: the SVG's ids are derived from it.
        curves: in drawing order.
        axis: how the vertical axis reads.
        marks: behind the curves.
    """

    def paint(axes: Axes) -> None:
        for mark in marks:
            colour = COLOURS[mark.colour % NUM_COLOURS]
            axes.axvline(mark.step, color=colour, linewidth=0.9, linestyle=DASHES[1])
        for curve in curves:
            _draw_curve(axes, curve)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _format_axis(axes, axis)
        axes.margins(x=0.02, y=0.1)

    return _draw(name, paint)


def draw_histogram(name: str, edges: Sequence[float], counts: Sequence[Sequence[int]]) -> str:
    """Return overlaid histograms as an ``<svg>`` element, a colour for each.

    Args:
        name: of the chart, unique on its page.
        edges: ``[bins + 1]`` of the common bins.
        counts: ``[groups][bins]``.
    """

    def paint(axes: Axes) -> None:
        for index, own in enumerate(counts):
            colour = COLOURS[index % NUM_COLOURS]
            axes.stairs(own, edges, color=colour, linewidth=1.5)
            axes.stairs(own, edges, color=colour, fill=True, alpha=0.2, linewidth=0)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.margins(x=0.02)

    return _draw(name, paint)


def draw_calibration(name: str, confidence: Sequence[float], accuracy: Sequence[float]) -> str:
    """Return how often a judge is right over how sure it is, beside the diagonal, as ``<svg>``.

    Args:
        name: of the chart, unique on its page.
        confidence: ``[bins]`` means, 0.5 to 1.
        accuracy: ``[bins]`` shares, 0 to 1.
    """

    def paint(axes: Axes) -> None:
        axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=0.8, linestyle=DASHES[1])
        axes.plot(confidence, accuracy, color=COLOURS[0], linewidth=1.7, marker="o", markersize=4)
        axes.set_xlim(0.48, 1.02)
        for part in (axes.xaxis, axes.yaxis):
            part.set_major_formatter(PercentFormatter(1.0, decimals=0))

    return _draw(name, paint)


def _draw(name: str, paint: Callable[[Axes], None]) -> str:
    """Return what ``paint`` draws, in the page's style."""
    style = {
        "svg.fonttype": "none",  # text stays text: the page's fonts, CJK included
        "svg.hashsalt": name,
        "font.size": 9,
        **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4, 2.2), layout="constrained")
        axes = figure.add_subplot()
        paint(axes)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", length=0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _colour(buffer.getvalue())


def _draw_curve(axes: Axes, curve: Curve) -> None:
    steps, values = thin(curve.steps, curve.values)
    axes.plot(
        steps,
        values,
        color=COLOURS[curve.colour % NUM_COLOURS],
        linestyle=DASHES[curve.colour // NUM_COLOURS % len(DASHES)],
        linewidth=0.8 if curve.faint else 1.7,
        alpha=0.35 if curve.faint else 1,
        marker="o" if curve.marked or len(steps) == 1 else "",
        markersize=4,
    )


def _format_axis(axes: Axes, axis: Axis) -> None:
    """Set scale and labels of the vertical axis."""
    if axis == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    formatters = {"count": EngFormatter(sep=""), "percent": PercentFormatter(1.0)}
    axes.yaxis.set_major_formatter(formatters.get(axis) or FuncFormatter(_show_tick))


def _show_tick(value: float, _position: int | None) -> str:
    """Return 0.0003 as 3e-4, other figures as they are."""
    if not value or abs(value) >= 1e-3:
        return f"{value:g}"
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


def _colour(svg: str) -> str:
    """Cut the XML head off and put CSS variables in the place of the stand-in colours."""
    svg = svg[svg.index("<svg") :]
    svg = svg.replace(INK, "var(--ink-soft)").replace(GRID, "var(--line)")
    for index, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--curve-{index})")
    return svg
