"""Whether prepared preferences are what a loss can learn from."""

from __future__ import annotations

import numpy as np

from trainer.config import DataConfig
from trainer.data.prepared.store import SourceStore, TokenStore
from trainer.errors import DataError

# KTO's authors recommend that desirable answers weigh 1 to 4/3 times as much in all as undesirable
# ones (arXiv:2402.01306, section 4.2); a tenth beyond either end is let pass.
RATIOS = (0.9, 1.1 * 4 / 3)


def refuse_lone_answers(store: TokenStore, asked: str) -> None:
    """Refuse sources in which an answer stands without another to compare it with.

    Args:
        store: of preferences.
        asked: what wants pairs, for the message.

    Raises:
        DataError: naming the source and how many there are.
    """
    for name, source in store.sources.items():
        has_chosen, has_rejected = _sides(source)
        if num := int((has_chosen != has_rejected).sum()):
            raise DataError(
                f"data.sources.{name}: {num:,} of {len(has_chosen):,} rows are single answers, "
                f"good or bad, without another answer to the same prompt; {asked} compares "
                "two. Give pairs, or learn from single answers with stage=dpo loss=kto"
            )


def check_labels(
    store: TokenStore, data: DataConfig, desirable_weight: float, undesirable_weight: float
) -> list[str]:
    """Refuse data without desirable or without undesirable answers; remark on lopsided weights.

    Args:
        store: of preferences: pairs count as one answer of each kind.
        data: with the sources' weights; one of weight 0 is not trained on.
        desirable_weight: of a desirable answer's loss.
        undesirable_weight: of an undesirable answer's loss.

    Raises:
        DataError: one of the two labels, or any other prompt, is missing.
    """
    counts = np.zeros(2, np.int64)
    for name, source in store.sources.items():
        if data.sources[name].weight > 0:
            trained = source.document_ids(held_out=False)
            counts += [int(side[trained].sum()) for side in _sides(source)]
            if len(np.unique(source.text_hashes)) == 1:
                raise DataError(
                    f"data.sources.{name}: all {len(source.text_hashes):,} rows have one prompt; "
                    "loss=kto measures how far the policy has moved by answers to other prompts. "
                    "Give more prompts, or another loss"
                )
    desirable, undesirable = counts.tolist()
    if not desirable or not undesirable:
        missing = "desirable (label true)" if not desirable else "undesirable (label false)"
        raise DataError(
            f"loss=kto needs both kinds of answers, but of {desirable + undesirable:,} for "
            f"training none is {missing}; add such rows, or use stage=sft for good answers alone"
        )
    ratio = desirable_weight * desirable / max(undesirable_weight * undesirable, 1e-12)
    if RATIOS[0] <= ratio <= RATIOS[1]:
        return []
    return [
        f"loss=kto: {desirable:,} desirable and {undesirable:,} undesirable answers, weighted "
        f"{desirable_weight:g} and {undesirable_weight:g}, are {ratio:.2f} to 1; 1 to 1.33 is "
        f"recommended, such as stage.objective.desirable_weight="
        f"{undesirable_weight * undesirable / desirable:.2g}"
    ]


def _sides(source: SourceStore) -> tuple[np.ndarray, np.ndarray]:
    """Return which documents have a chosen, and which a rejected answer. -> [n], [n]"""
    assert source.first_lengths is not None
    return source.first_lengths > 0, source.first_lengths < np.diff(source.offsets)
