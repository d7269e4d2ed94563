"""Who may read what a run writes: nobody else, or the Unix group when the config says so."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

PRIVATE, SHARED = 0o077, 0o027  # what a new file or folder does not allow


@contextmanager
def private_files(shared: bool = False) -> Iterator[None]:
    """Let nobody else read what is written meanwhile, or the group: clusters are shared.

    Args:
        shared: ``cluster.share_with_group``.
    """
    before = os.umask(SHARED if shared else PRIVATE)
    try:
        yield
    finally:
        os.umask(before)


def wants_sharing(values: Mapping[str, Any]) -> bool:
    """Return ``cluster.share_with_group`` of values not yet checked; what is odd shares nothing."""
    cluster = values.get("cluster")
    return isinstance(cluster, Mapping) and cluster.get("share_with_group") is True
