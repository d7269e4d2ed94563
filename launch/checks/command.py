"""Asking a program of the machine."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Answer:
    """What a program said.

    Attributes:
        code: its exit code; None when it is not installed, or said nothing in time.
        text: standard output.
        complaint: standard error, or why there is no answer.
    """

    code: int | None
    text: str
    complaint: str

    @property
    def is_good(self) -> bool:
        """Whether the program ran and was content."""
        return self.code == 0


def ask(command: Sequence[str], stdin: str = "", timeout_s: float = TIMEOUT_S) -> Answer:
    """Run ``command`` and return what it said; nothing is raised."""
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, errors="replace",
            timeout=timeout_s,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Answer(None, "", f"`{command[0]}` gave no answer within {timeout_s:.0f} s")
    except OSError as error:
        return Answer(None, "", f"`{command[0]}` cannot be run: {error.strerror}")
    return Answer(done.returncode, done.stdout, done.stderr.strip())
