"""How figures, texts and times read on a page."""

from __future__ import annotations

import time
from typing import Any


def show_number(value: Any) -> str:
    """Return a figure with at least four significant digits, a whole number with separators."""
    if value is None:
        return "–"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.4g}"
    num_decimals = 4 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    return f"{value:,.{num_decimals}f}"


def show_share(value: float) -> str:
    """Return 0.034 as 3.4%."""
    return f"{value:.1%}"


def show_setting(value: Any) -> str:
    """Return a figure without trailing zeros, a path or word as it is."""
    if not isinstance(value, float):
        return show_number(value)
    return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"


# A young model writes control characters; Unicode has pictures of them, HTML forbids them.
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}


def show_text(text: str) -> str:
    """Return what a model wrote with its control characters made visible."""
    return text.translate({**CONTROL_PICTURES, 0x7F: 0x2421})


def show_time(seconds: float) -> str:
    """Return seconds since the epoch as local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
