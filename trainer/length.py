"""How long a run is: optimizer steps and passes over its data."""

from __future__ import annotations

import dataclasses

from trainer.config import RunConfig
from trainer.data.batches.loader import make_mixture, make_rows
from trainer.data.batches.mixture import Mixture
from trainer.data.prepared.store import TokenStore

# Repeating data up to 4 times is nearly as good as new data, beyond 16 it is worth next to nothing
# (Muennighoff et al., arXiv:2305.16264).
MANY_PASSES = 16


def rows_per_step(config: RunConfig) -> int:
    """Return the rows of one optimizer step over all ranks."""
    return config.loop.global_batch_tokens // config.data.max_length


def count_steps(config: RunConfig, store: TokenStore, num_rows: int) -> tuple[RunConfig, list[str]]:
    """Set ``loop.max_steps`` to what ``loop.epochs`` takes, unless it is less already.

    Args:
        config: with ``loop.epochs``.
        store: the run's prepared sources.
        num_rows: rows a step takes over all ranks.

    Returns:
        The config, and remarks for the user.
    """
    assert config.loop.epochs is not None
    rows = make_rows(store, config.data, config.loop.seed)
    mixture = make_mixture(rows, config.data, config.loop.seed)
    epochs, limit = config.loop.epochs, config.loop.max_steps
    needed = mixture.num_steps(epochs, num_rows)
    remarks = [
        f"loop.epochs={epochs:g} takes {needed} steps: {mixture.rows_per_pass:,.0f} rows an epoch, "
        f"{num_rows} rows a step"
    ]
    if limit and limit < needed:
        share = limit / needed * epochs
        remarks.append(
            f"loop.max_steps={limit} ends the run earlier, after {share:.2g} epochs; with "
            "loop.max_steps=0 it runs to the end"
        )
    steps = min(needed, limit or needed)
    loop = dataclasses.replace(config.loop, max_steps=steps)
    return dataclasses.replace(config, loop=loop), remarks


def warn_of_repetition(config: RunConfig, mixture: Mixture, num_rows: int) -> list[str]:
    """Return a warning for each source that ``loop.max_steps`` passes over very often."""
    if config.loop.epochs is not None:
        return []  # asked for in so many words
    passes = mixture.epochs_at(config.loop.max_steps * num_rows)
    return [
        f"loop.max_steps={config.loop.max_steps} passes {num:.0f} times over data.sources.{name}, "
        f"which is only {mixture.rows_per_epoch[name]} rows; a model gains little beyond "
        f"{MANY_PASSES} passes. Fewer steps (or loop.epochs), a smaller weight or more data"
        for name, num in passes.items()
        if num > MANY_PASSES
    ]
