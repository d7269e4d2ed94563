"""Scripts of characters: which pieces may be added, and what a vocabulary is made of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import regex

from trainer.errors import ConfigError

# In order: the first class that matches a character names it. cjk_punctuation leaves out U+2010 to
# U+2027 (“ ” … —), which English text uses as well.
SCRIPT_PATTERNS = {
    "han": r"\p{Han}",
    "cjk_punctuation": r"[\u3000-\u303F\uFE30-\uFE4F\uFE50-\uFE6B"
    r"\uFF01-\uFF0F\uFF1A-\uFF20\uFF3B-\uFF40\uFF5B-\uFF65]",
    "bopomofo": r"\p{Bopomofo}",
    "kana": r"[\p{Hiragana}\p{Katakana}ー\uFF70\uFF9E\uFF9F]",
    "hangul": r"\p{Hangul}",
    "fullwidth": r"[\uFF10-\uFF19\uFF21-\uFF3A\uFF41-\uFF5A\uFFE0-\uFFEE]",
    "latin": r"\p{Latin}",
    "cyrillic": r"\p{Cyrillic}",
    "greek": r"\p{Greek}",
    "digit": r"\p{N}",
    "space": r"[\s▁]",
    "symbol": r"[\p{P}\p{S}]",
    "other": r"[\s\S]",
}
DEFAULT_SCRIPTS = ("han", "cjk_punctuation")
_CLASSES = {name: regex.compile(pattern) for name, pattern in SCRIPT_PATTERNS.items()}


@lru_cache(maxsize=200_000)
def script_of(character: str) -> str:
    """Return the class of one character, a key of ``SCRIPT_PATTERNS``."""
    return next(name for name, pattern in _CLASSES.items() if pattern.match(character))


def scripts_of(text: str) -> set[str]:
    """Return the classes of all characters of a text."""
    return {script_of(character) for character in text}


def check_scripts(scripts: Sequence[str]) -> None:
    """Check names of scripts.

    Raises:
        ConfigError: naming the unknown one and the known ones.
    """
    for name in scripts:
        if name != "all" and name not in SCRIPT_PATTERNS:
            raise ConfigError(
                f"stage.scripts holds {name!r}, which is no script; use all or some of "
                + ", ".join(SCRIPT_PATTERNS)
            )


@lru_cache(maxsize=32)
def run_pattern(scripts: tuple[str, ...]) -> regex.Pattern[str]:
    """Return the pattern of a longest run of characters of these scripts (``all``: of a line)."""
    check_scripts(scripts)
    if "all" in scripts:
        return regex.compile(r"[^\r\n]+")
    return regex.compile("(?:" + "|".join(SCRIPT_PATTERNS[name] for name in scripts) + ")+")
