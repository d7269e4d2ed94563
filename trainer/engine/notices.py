"""What libraries print for their own authors, kept out of a run's log."""

from __future__ import annotations

import logging
import warnings


def quiet_deepspeed() -> None:
    """Keep DeepSpeed's INFO lines, and torch's notices to its authors, out of the log."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
