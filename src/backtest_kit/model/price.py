"""How a price is written, everywhere."""

from __future__ import annotations

import math
from typing import Final

_DIGITS: Final = 8
"""Significant digits: the tick of a 100,000 dollar coin, and of one that costs 0.00000001."""


def price_text(value: float) -> str:
    """A price with up to eight significant digits, its whole part always entire, and never with an exponent.

    `68006.85`, `1.08345`, `0.000012345`; `N/A` if there is no finite number.
    """
    if not math.isfinite(value):
        return "N/A"
    text = f"{value:.{_decimals(value)}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def price_decimals(value: float) -> int:
    """How many decimals `price_text` shows of it."""
    return len(price_text(value).partition(".")[2])


def _decimals(value: float) -> int:
    return max(0, _DIGITS - 1 - math.floor(math.log10(abs(value)))) if value else 0
