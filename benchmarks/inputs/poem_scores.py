"""Scores of answers to the poem task, averaged over rows, and where the measures begin and end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.inputs.tang_poems import Row, verses
from benchmarks.inputs.verses import Rhymes, form, overlap

NAMES = {
    "length": "clause length",
    "count": "number of clauses",
    "form": "both",
    "regular": "絕句 or 律詩",
    "overlap": "overlap",
    "rhyme": "rhyme",
    "distinct": "different answers",
}


def learn_rhymes(poems: Path) -> Rhymes:
    """Return the rhymes of the pretraining poems, which hold no examined one."""
    with poems.open(encoding="utf-8") as file:
        return Rhymes(verses(json.loads(line)["text"]) for line in file)


def score(rows: Sequence[Row], answers: Sequence[str], rhymes: Rhymes) -> dict[str, float]:
    """Return the mean of each measure of ``NAMES``, from 0 to 1.

    An answer without an even clause has no rhyme, which counts as 0. ``distinct`` is the share of
    different answers: a model that always says the same scores well on form alone.
    """
    forms = [form(r["input"], a, r["output"]) for r, a in zip(rows, answers, strict=True)]
    pairs = list(zip(rows, answers, strict=True))
    sums = {
        "length": sum(f.length for f in forms),
        "count": sum(f.count for f in forms),
        "form": sum(f.whole for f in forms),
        "regular": sum(f.regular for f in forms),
        "overlap": sum(overlap(answer, row["output"]) for row, answer in pairs),
        "rhyme": sum(rhymes.agreement(row["input"], answer) or 0.0 for row, answer in pairs),
        "distinct": len(set(answers)),
    }
    return {name: total / len(rows) for name, total in sums.items()}


def bounds(rows: Sequence[Row], rhymes: Rhymes) -> dict[str, dict[str, float]]:
    """Return the scores of the true poems, and of true poems given to other couplets."""
    truths = [row["output"] for row in rows]
    others = truths[1:] + truths[:1]
    return {
        "the true poems": score(rows, truths, rhymes),
        "true poems of other couplets": score(rows, others, rhymes),
    }


def table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Return a Markdown table, percent."""
    lines = [f"| answers | {' | '.join(NAMES.values())} |", "|---" * (len(NAMES) + 1) + "|"]
    for name, own in scores.items():
        cells = " | ".join(f"{100 * own[key]:.1f}" for key in NAMES)
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def plot(scores: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draw form, rhyme and overlap over temperature (top_p=1) and over top_p (temperature=1).

    Args:
        scores: by names such as ``temperature=0.5`` and ``top_p=0.9``; 0 stands for greedy.
        path: the .svg file to write.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    for axes, key in zip(figure.subplots(1, 2, sharey=True), ("temperature", "top_p"), strict=True):
        points = sorted(
            (float(name.partition("=")[2]), own)
            for name, own in scores.items()
            if name.startswith(f"{key}=")
        )
        for measure in ("form", "regular", "rhyme", "overlap"):
            values = [100 * own[measure] for _, own in points]
            label = {"regular": "4 or 8 clauses in all"}.get(measure, measure)
            axes.plot([x for x, _ in points], values, marker="o", label=label)
        axes.set_xlabel(f"{key}{' (0: greedy)' if key == 'temperature' else ', temperature 1'}")
        axes.grid(alpha=0.3)
        axes.set_ylim(0, 103)
    figure.axes[0].set_ylabel("held-out poems, %")
    figure.axes[0].legend(fontsize=8, loc="center left", bbox_to_anchor=(0, 0.73))
    with rc_context({"svg.hashsalt": "kuroshio"}):  # the same scores give the same file
        figure.savefig(path, metadata={"Date": None})
