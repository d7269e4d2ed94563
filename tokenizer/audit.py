"""Audit an extended tokenizer against its base: one dictionary, written as JSON and as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from tokenizer.measure import (
    Density,
    Encoder,
    count_spelt_in_bytes,
    find_dead,
    find_disparity,
    find_drift,
    measure_density,
)
from tokenizer.scripts import scripts_of

NUM_SHOWN = 40  # examples of dead and dropped pieces, of characters spelt in bytes
SAMPLE_SOURCE = "sample sentences"

# From the rows of a vocabulary matrix to the training FLOPs of one token: (layers, head).
TokenFlops = Callable[[int], tuple[float, float]]
Step = Callable[[str], None]  # called with the name of the measurement that begins


@dataclass(frozen=True)
class Candidate:
    """Another size of the vocabulary: how many pieces the donor had, and the tokenizer."""

    pieces: int
    encoder: Encoder


@dataclass(frozen=True)
class Subject:
    """What is audited."""

    base: Encoder
    new: Encoder
    scripts: tuple[str, ...]
    dropped: Mapping[str, Sequence[str]] = field(default_factory=dict)  # reason → donor pieces
    intermediates: Sequence[str] = ()
    num_pieces: int = 0  # of the donor model
    candidates: Sequence[Candidate] = ()  # other sizes, for the curve


def audit(
    subject: Subject,
    sources: Mapping[str, Sequence[str]],
    sentences: Sequence[str],
    pad_to_multiple: int,
    token_flops: TokenFlops,
    step: Step = lambda _: None,
) -> dict[str, Any]:
    """Measure an extension.

    Args:
        subject: base and new tokenizer, and what the merge left out.
        sources: texts per source; without any, the sentences are the only source.
        sentences: texts shown side by side.
        pad_to_multiple: rows of the vocabulary matrices are a multiple of this.
        token_flops: training FLOPs of one token, layers and head, for a number of rows.
        step: called with the name of each measurement as it begins.

    Returns:
        Plain data (JSON).
    """
    base, new = subject.base, subject.new
    sources = dict(sources) or {SAMPLE_SOURCE: list(sentences)}
    texts = [text for part in sources.values() for text in part]
    scripts = ("han", "cjk_punctuation") if "all" in subject.scripts else subject.scripts
    step("dead pieces")
    dead = find_dead(new, base.num_ids)
    step("drift")
    drift = find_drift(base, new, texts, scripts)
    step("slow and fast encodings")
    parity = {name: find_disparity(new, part) for name, part in sources.items()}
    step("density and round trip")
    before = {name: measure_density(base, part) for name, part in sources.items()}
    after = {name: measure_density(new, part) for name, part in sources.items()}
    step("curve")
    points = [
        (0, base.num_ids, before),
        (subject.num_pieces, new.num_ids, after),
        *(_measure(candidate, sources) for candidate in subject.candidates),
    ]
    curve = _curve(sorted(points, key=itemgetter(1)), pad_to_multiple, token_flops)
    return {
        "base_ids": base.num_ids,
        "new_ids": new.num_ids,
        "rows": _rows(new.num_ids, pad_to_multiple),
        "scripts": list(subject.scripts),
        "pieces": _describe_pieces(subject),
        "dead": {
            "count": max(map(len, dead.values())),
            "of": new.num_ids - base.num_ids,
            "pieces": dead,
        },
        "drift": {**drift, "without": list(scripts)},
        "parity": parity if new.slow is not None else None,
        "sources": {name: _before_and_after(before[name], after[name]) for name in sources},
        "spelt_in_bytes": count_spelt_in_bytes(new, texts, NUM_SHOWN),
        "sentences": [_side_by_side(subject, sentence) for sentence in sentences],
        "curve": curve,
    }


def _describe_pieces(subject: Subject) -> dict[str, Any]:
    """Count the new tokens by length in characters and by script."""
    ids = range(subject.base.num_ids, subject.new.num_ids)
    spelt = [subject.new.spelling(index) for index in ids]
    texts = [text for text in spelt if text]
    lengths = Counter(len(text.strip() or text) for text in texts)
    scripts = Counter(" + ".join(sorted(scripts_of(text.strip() or text))) for text in texts)
    parts = [t for i, t in zip(ids, spelt, strict=True) if t is None]
    dropped = {reason: list(names) for reason, names in subject.dropped.items() if names}
    return {
        "added": len(spelt),
        "by_length": dict(sorted(lengths.items())),
        "by_script": dict(scripts.most_common()),
        "special_or_partial": len(parts),
        "intermediates": len(subject.intermediates),
        "dropped": {
            reason: {"count": len(names), "examples": names[:NUM_SHOWN]}
            for reason, names in dropped.items()
        },
    }


def _before_and_after(before: Density, after: Density) -> dict[str, Any]:
    saved = 1 - after.tokens / before.tokens if before.tokens else 0.0
    return {"before": before.figures(), "after": after.figures(), "tokens_saved": saved}


def _side_by_side(subject: Subject, sentence: str) -> dict[str, Any]:
    shown = {}
    for name, encoder in (("before", subject.base), ("after", subject.new)):
        ids = encoder.backend.encode(sentence, add_special_tokens=False).ids
        shown[name] = encoder.show(ids)
    return {"text": sentence, **shown}


def _measure(
    candidate: Candidate, sources: Mapping[str, Sequence[str]]
) -> tuple[int, int, dict[str, Density]]:
    parts = {name: measure_density(candidate.encoder, part) for name, part in sources.items()}
    return candidate.pieces, candidate.encoder.num_ids, parts


def _curve(
    measured: Sequence[tuple[int, int, dict[str, Density]]],
    pad_to_multiple: int,
    token_flops: TokenFlops,
) -> list[dict[str, Any]]:
    """Say for each size (pieces, ids, densities) what a character costs to train on."""
    points: list[dict[str, Any]] = []
    for pieces, ids, parts in measured:
        rows = _rows(ids, pad_to_multiple)
        density = _ratio(parts.values())
        layers, head = token_flops(rows)
        points.append(
            {
                "pieces": pieces,
                "ids": ids,
                "rows": rows,
                "tokens_per_character": density,
                "per_source": {name: _ratio([part]) for name, part in parts.items()},
                "layer_flops_per_character": density * layers,
                "head_flops_per_character": density * head,
            }
        )
    reference = _flops(points[0])
    return [
        {**point, "relative_flops": _flops(point) / reference if reference else None}
        for point in points
    ]


def _flops(point: Mapping[str, Any]) -> float:
    return float(point["layer_flops_per_character"] + point["head_flops_per_character"])


def _ratio(parts: Iterable[Density]) -> float:
    densities = list(parts)
    return sum(d.tokens for d in densities) / max(1, sum(d.characters for d in densities))


def _rows(num_ids: int, multiple: int) -> int:
    return -(-num_ids // multiple) * multiple
