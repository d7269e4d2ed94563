"""Load MODEL for the verbs that take one, and say what was loaded."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from transformers.utils import logging

from trainer.inference.chat_model import ChatModel
from trainer.inference.loading import Loading, load_chat_model


def load(folder: Path, loading: Loading, local_rank: int = 0, rank: int = 0) -> ChatModel:
    """Load MODEL; rank 0 shows progress on a terminal and describes the model.

    Raises:
        ConfigError: the folder is no model, or a setting does not fit it.
        CheckpointError: a run without a complete checkpoint.
        DataError: a file that cannot be read.
    """
    logging.set_verbosity_error()
    if rank > 0 or not sys.stderr.isatty():
        logging.disable_progress_bar()
    chat_model = load_chat_model(folder, loading, local_rank)
    if rank == 0:
        notices().print(describe(chat_model))
    return chat_model


def describe(chat_model: ChatModel) -> str:
    """Return a line on a model: size, precision, device, context."""
    model, context = chat_model.model, chat_model.context_length
    precision = str(model.dtype).removeprefix("torch.")
    return (
        f"{chat_model.name}: {model.num_parameters():,} parameters, {precision} on "
        f"{chat_model.device}, context {f'{context:,} tokens' if context else 'without limit'}"
    )


def notices() -> Console:
    """Return where everything goes that is no answer: standard error."""
    return Console(stderr=True, highlight=False, markup=False, style="dim", soft_wrap=True)
