"""``kuroshio chat MODEL``: talk with a model in the terminal, or from piped lines."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.options import read_options, split_words

INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended


@dataclass(frozen=True)
class Opening:
    """What stands before the first question.

    Attributes:
        system: the system prompt.
        persona: file that holds it.
    """

    system: str | None = None
    persona: str | None = None

    def problems(self) -> list[str]:
        """Return what contradicts itself or cannot be read."""
        if self.system is not None and self.persona is not None:
            return [f"system and persona={self.persona} are both given; give one of them"]
        try:
            self.text()
        except (OSError, UnicodeDecodeError) as error:
            return [f"persona={self.persona} cannot be read as UTF-8 text: {error}"]
        return []

    def text(self) -> str | None:
        """Return the system prompt, if there is one."""
        if self.persona is None:
            return self.system
        return Path(self.persona).read_text(encoding="utf-8-sig").strip()


def main(arguments: Sequence[str]) -> int:
    """Load the model and talk until the input ends; return the exit code.

    Raises:
        ConfigError: a word, a key or the model folder is wrong.
        CheckpointError: a run without a complete checkpoint.
    """
    (folder,), overrides = split_words("chat", arguments, ["MODEL"])
    try:
        return _talk(folder, overrides)
    except KeyboardInterrupt:  # while loading, or in piped input
        return INTERRUPTED


def _talk(folder: Path, overrides: list[str]) -> int:
    from launch.loaded_model import load
    from launch.terminal_chat import TerminalChat
    from trainer.inference.decoding import Decoding
    from trainer.inference.loading import Loading

    opening, loading, decoding = read_options("chat", overrides, Opening, Loading, Decoding)
    chat_model = load(folder, loading)
    _understand_utf8()
    words = [word for word in overrides if word.partition("=")[0] in vars(decoding)]
    TerminalChat(chat_model, decoding, words, opening.text()).run()
    return 0


def _understand_utf8() -> None:
    """Read and write UTF-8 also where the locale says otherwise, as on many login nodes."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
