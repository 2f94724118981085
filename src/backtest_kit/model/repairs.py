"""How bad rows of a source are repaired, and how that is reported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

REPAIRS: Final = {
    "moved": "moved up to the next whole minute",
    "repeated": "repeated and counted once",
    "conflicting": "ignored: an earlier row has the same minute",
    "unsorted": "out of order and sorted",
    "no_time": "dropped: no readable timestamp",
    "not_finite": "dropped: a value is missing or not a finite number",
    "price": "dropped: a price is not above 0",
    "volume": "dropped: the volume is negative",
    "range": "dropped: high is below low",
    "outlier": "dropped: price below that of the minute before / CC_GET_CANDLES_PRICE_ANOMALY_THRESHOLD_FACTOR",
}
"""What is done to the rows of each kind. The minute of a dropped row counts as missing."""


def describe_repairs(repairs: Mapping[str, int]) -> str:
    """`2 moved up to the next whole minute; 1 dropped: high is below low`, in the order of `REPAIRS`."""
    return "; ".join(f"{repairs[kind]:,} {words}" for kind, words in REPAIRS.items() if repairs.get(kind))
