"""Rules that judge an answer by its text: one pure function each.

A rule is called as ``rule(prompt, response, answer, **options)`` and returns a number. ``answer``
is the one the data gives to the prompt, None where it gives none. Its keyword arguments are its
options in the config; their types and defaults are checked there.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

Rule = Callable[..., float]

BIG5_FREQUENT = (b"\xa4\x40", b"\xc6\x7e")  # first and last of Big5's 5,401 frequent characters
GB2312_FREQUENT = (0xB0, 0xD7)  # lead bytes of GB 2312's 3,755 frequent characters


def length(prompt: str, response: str, answer: str | None, *, low: int = 0, high: int) -> float:
    """Return 1 for a response of ``low`` to ``high`` characters, less the farther it is from that.

    Outside it is the shorter length over the longer one, so that a policy far off learns the way.
    """
    if not 0 <= low <= high or not high:
        raise ValueError(f"low={low}, high={high}: expected 0 <= low <= high, high above 0")
    num_chars = len(response.strip())
    return num_chars / low if num_chars < low else high / max(num_chars, high)


def regex(prompt: str, response: str, answer: str | None, *, pattern: str) -> float:
    """Return 1 if the pattern is found in the response, else 0; ``^`` and ``$`` are its ends."""
    return float(re.search(pattern, response, re.DOTALL) is not None)


def contains(prompt: str, response: str, answer: str | None, *, texts: list[str]) -> float:
    """Return the share of ``texts`` that occur in the response."""
    if not texts or not all(texts):
        raise ValueError(f"texts={texts}: expected texts of at least one character")
    return sum(text in response for text in texts) / len(texts)


def exact(prompt: str, response: str, answer: str | None, *, pattern: str | None = None) -> float:
    """Return 1 if the response is the answer that the data gives, else 0.

    Width of characters, case and white space make no difference. With a pattern, the last thing
    its first group finds in the response is compared, and what it finds in the answer if it does.
    """
    if answer is None:
        raise ValueError("the data gives no answer to this prompt")
    found = response if pattern is None else _last_group(pattern, response)
    wanted = answer if pattern is None else _last_group(pattern, answer) or answer
    return float(found is not None and _fold(found) == _fold(wanted))


def language(prompt: str, response: str, answer: str | None) -> float:
    """Return the share of Traditional Chinese among the letters, less that of Simplified.

    From -1 to 1; 0 without letters. See ``script_of``.
    """
    letters = [script_of(char) for char in response if char.isalpha()]
    return sum(letters) / len(letters) if letters else 0.0


RULES: dict[str, Rule] = {
    "length": length,
    "regex": regex,
    "contains": contains,
    "exact": exact,
    "language": language,
}


@lru_cache(maxsize=1 << 16)
def script_of(char: str) -> int:
    """Return 1 for a character of Traditional Chinese, -1 for one of Simplified alone, else 0.

    The standards say which is which: Traditional is what CP950 (Big5) encodes, Simplified what GB
    2312 encodes and CP950 does not. 118 characters are frequent by GB 2312 and in CP950, but not
    among Big5's frequent ones: short forms of the mainland (万, 与, 体) beside rare words; they
    count for neither.
    """
    if unicodedata.category(char) != "Lo" or not unicodedata.name(char, "").startswith("CJK"):
        return 0
    big5, gb = _encode(char, "cp950"), _encode(char, "gb2312")
    if not big5:
        return -1 if gb else 0
    is_frequent = BIG5_FREQUENT[0] <= big5 <= BIG5_FREQUENT[1]
    is_short_form = gb and GB2312_FREQUENT[0] <= gb[0] <= GB2312_FREQUENT[1]
    return int(is_frequent or not is_short_form)


def _encode(char: str, codec: str) -> bytes:
    """Return a character's bytes, none where the codec lacks it."""
    return char.encode(codec, "ignore")


def _last_group(pattern: str, text: str) -> str | None:
    if not re.compile(pattern).groups:
        raise ValueError(f"pattern={pattern!r}: expected a group, ( ), around what is compared")
    found = [match.group(1) for match in re.finditer(pattern, text, re.DOTALL)]
    return found[-1] if found else None


def _fold(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
