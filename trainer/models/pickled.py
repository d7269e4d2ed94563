"""Weights that a folder holds as pickles only: read as tensors and nothing else, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError  # an exception; nothing is unpickled here

import torch
from packaging.version import Version

from trainer.errors import ConfigError

# Older ones can be made to run code, or to write past their buffers, even with weights_only:
# CVE-2025-32434 (mended in 2.6), CVE-2026-24747 (in 2.10).
OLDEST_TORCH = "2.10"
CONVERT = (
    "convert it where it may be trusted: AutoModelForCausalLM.from_pretrained(FOLDER)"
    ".save_pretrained(NEW) writes safetensors"
)


def has_pickles_only(folder: Path) -> bool:
    """Return whether weights lie in a folder as ``.bin`` alone; beside safetensors none is read."""
    return any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors"))


@contextmanager
def only_tensors(folder: Path, torch_version: str = torch.__version__) -> Iterator[None]:
    """Refuse a folder whose pickles could do more than hold tensors.

    Inside the block transformers loads them with ``weights_only=True``, its default.

    Raises:
        ConfigError: this torch would not keep them from running code, or they try to.
    """
    release = Version(torch_version).base_version
    if has_pickles_only(folder) and Version(release) < Version(OLDEST_TORCH):
        raise ConfigError(
            f"model.path={folder} holds pickles (.bin), which torch {torch_version} cannot read "
            f"safely; install torch >= {OLDEST_TORCH}, or {CONVERT}"
        )
    try:
        yield
    except UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "Trying" in line), "")
        reason = reason.strip() or str(error).partition("\n")[0]
        raise ConfigError(
            f"model.path={folder} holds a pickle (.bin) that is damaged, or is more than tensors "
            f"and would run code ({reason}); it was not run. If you know it, {CONVERT}"
        ) from error
