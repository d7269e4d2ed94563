"""Curves: smoothing, thinning, and SVG that a page can colour."""

import xml.etree.ElementTree as ElementTree

import pytest

from trainer.metrics.charts import (
    MAX_POINTS,
    Axis,
    Curve,
    Mark,
    draw_calibration,
    draw_chart,
    draw_histogram,
    smooth,
    thin,
)


def test_smoothing_does_not_lag() -> None:
    falling = [float(1000 - step) for step in range(1000)]
    assert smooth(falling)[300:700] == pytest.approx(falling[300:700])
    noisy = [(-1.0) ** step for step in range(600)]
    assert max(map(abs, smooth(noisy))) <= 0.1
    assert smooth([1.0, 5.0]) == [1.0, 5.0] and smooth([]) == []


def test_thinning_keeps_spikes_and_ends() -> None:
    values = [0.0] * 50_000
    values[33_333], values[41_000] = 9.0, -9.0
    steps, kept = thin(range(50_000), values)
    assert len(steps) <= MAX_POINTS + 2 and steps == sorted(steps)
    assert (33_333, 9.0) in zip(steps, kept, strict=True) and -9.0 in kept
    assert steps[0] == 0 and steps[-1] == 49_999
    assert thin([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0])


@pytest.mark.parametrize("axis", ["plain", "count", "percent", "log"])
def test_svg_is_well_formed_and_takes_the_pages_colours(axis: Axis) -> None:
    curves = [Curve([0, 10, 20], [3e-4, 2e-4, 1e-4], marked=True, colour=i) for i in range(10)]
    svg = draw_chart("lr", curves, axis)
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    assert "var(--curve-0)" in svg and "var(--curve-7)" in svg and "#0102" not in svg
    assert "stroke-dasharray" in svg  # more curves than colours


def test_a_mark_is_a_line_of_its_colour_and_moves_no_axis() -> None:
    curves = [Curve([0, 10], [2.0, 1.0])]
    plain, marked = (draw_chart("loss", curves, marks=m) for m in ([], [Mark(4, 5), Mark(7, 5)]))
    assert "--curve-5" not in plain and marked.count("--curve-5") == 2
    ticks = [svg.split('id="matplotlib.axis_2')[0].count("<text") for svg in (plain, marked)]
    assert ticks[0] == ticks[1]


def test_ticks_read_as_people_write_them() -> None:
    assert ">2e-4<" in draw_chart("lr", [Curve([0, 1], [0.0, 4e-4])]).replace(" ", "")
    assert "10k" in draw_chart("rate", [Curve([0, 1], [0, 20_000])], "count")
    assert ">40.0%<" in draw_chart("mfu", [Curve([0, 1], [0.2, 0.6])], "percent")


def test_ids_of_two_charts_do_not_clash() -> None:
    curve = [Curve([0, 1], [0.0, 1.0])]
    first, second = (draw_chart(name, curve) for name in ("loss", "lr"))
    clips = [set(svg.split('clipPath id="')[1].split('"')[:1]) for svg in (first, second)]
    assert clips[0] != clips[1]
    assert first == draw_chart("loss", curve)  # and it is the same page again


def test_drawings_of_scores_are_svg_in_the_pages_colours() -> None:
    counts = [[3, 0, 1], [0, 2, 2]]
    histogram = draw_histogram("scores", [-1.0, 0.0, 1.0, 2.0], counts)
    calibration = draw_calibration("sure", [0.55, 0.85], [0.5, 0.9])
    for svg in (histogram, calibration):
        assert ElementTree.fromstring(svg).tag.endswith("svg") and "#0102" not in svg
    assert histogram.count("var(--curve-0)") == histogram.count("var(--curve-1)") == 2
    assert "60%" in calibration.replace(" ", "") and "stroke-dasharray" in calibration
    assert histogram != draw_histogram("scores", [-1.0, 0.0, 1.0, 2.0], counts[::-1])
