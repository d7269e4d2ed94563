"""Transcripts as HH-RLHF writes them: one text with "Human:" and "Assistant:" before each turn.

https://github.com/anthropics/hh-rlhf
"""

from __future__ import annotations

import re

from trainer.data.chats.conversation import Message
from trainer.data.reading.raw import RowError

TURN = re.compile(r"\n\n(Human|Assistant):")
BEGINNING = re.compile(r"\s*(Human|Assistant):")


def is_transcript(text: str) -> bool:
    """Tell whether a text begins as a transcript does."""
    return BEGINNING.match(text) is not None


def read_transcript(text: str) -> list[Message]:
    """Return the turns of a transcript.

    The space after a speaker's name is no part of what is said; all other space is. An answer of
    no characters at the end, where a prompt was cut off, stays as an empty message.

    Raises:
        RowError: the text begins with something else than a turn.
    """
    if not is_transcript(text):
        raise RowError(f"no transcript: it begins with {text[:40]!r}, not with a speaker's name")
    parts = TURN.split("\n\n" + text.lstrip())
    return [
        Message("user" if speaker == "Human" else "assistant", said.removeprefix(" "))
        for speaker, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
