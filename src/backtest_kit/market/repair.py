"""What becomes of rows that no candle can be made of: refused, or repaired without looking ahead."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from backtest_kit.errors import UserError
from backtest_kit.market.integrity import FAULTS, is_plausible, whole_minutes
from backtest_kit.model.candle import NO_TIME, PRICE_COLUMNS, CandleSeries
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.settings import Settings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Mask: TypeAlias = "NDArray[np.bool_]"

DirtyRule = Literal["refuse", "repair"]


class Repaired(NamedTuple):
    """The candles of a range that were made of raw rows: on whole minutes, ascending, unique, plausible."""

    candles: CandleSeries
    repairs: Counter[str]
    """How many rows of the range each entry of `REPAIRS` was done to."""
    published: Mask
    """Candles that are rows of the source as they came: only those may be cached."""


def dirty_rule(dirty: DirtyRule | None, gaps: str) -> DirtyRule:
    """The given rule; without one, rows are repaired where missing minutes are filled.

    Raises:
        UserError: unknown rule.
    """
    if dirty is None:
        return "repair" if gaps == "fill" else "refuse"
    if dirty not in get_args(DirtyRule):
        raise UserError(f"dirty is {dirty!r}: use one of {', '.join(get_args(DirtyRule))}")
    return dirty


def repair(rows: CandleSeries, start_ms: int, stop_ms: int, settings: Settings) -> Repaired:
    """The candles of `[start_ms, stop_ms)` from raw rows in any order.

    A row that opens between two minutes becomes the candle of the later one: it closes after the earlier one does,
    and would be known too early there. So the candle of a minute depends on rows that opened in the minute up to it,
    and for the comparison of prices on those of the minute before: give the rows from `start_ms` - 1 minute on.
    """
    minutes = whole_minutes(rows.timestamp)
    wanted = (minutes >= start_ms - MINUTE_MS) & (minutes < stop_ms)
    untimed = rows.timestamp == NO_TIME
    repairs: Counter[str] = Counter()
    if untimed.any():
        repairs["no_time"] = int(np.count_nonzero(untimed))
        wanted &= ~untimed
    rows = rows if wanted.all() else rows.take(wanted)
    if _is_clean(rows, settings):
        return as_published(rows.between(start_ms, stop_ms))._replace(repairs=repairs)

    def count(kind: str, wrong: Mask) -> None:
        number = int(np.count_nonzero(wrong & (whole_minutes(rows.timestamp) >= start_ms)))
        if number:
            repairs[kind] += number

    for fault in FAULTS:
        # Rows at fault are taken out one rule after the other: each is counted once.
        wrong = fault.find(rows)
        if wrong.any():
            count(fault.kind, wrong)
            rows = rows.take(~wrong)
    count("unsorted", np.concatenate(([False], np.diff(rows.timestamp) < 0))[: len(rows)])
    rows = rows.take(np.argsort(rows.timestamp, kind="stable"))
    minutes = whole_minutes(rows.timestamp)
    moved = minutes != rows.timestamp
    first = np.concatenate(([True], np.diff(minutes) > 0))[: len(rows)]
    stays = np.flatnonzero(first)[np.cumsum(first) - 1]
    """For each row the one that stays for its minute."""
    same = np.logical_and.reduce([column == column[stays] for column in rows.columns().values()])
    contested = np.zeros(len(rows), dtype=bool)
    contested[stays[~same]] = True
    count("moved", moved & first)
    count("repeated", ~first & same)
    count("conflicting", ~same)
    published = ~(moved | contested)[first]
    columns = {name: column[first] for name, column in rows.columns().items()}
    rows = CandleSeries(**{**columns, "timestamp": minutes[first]})
    outlier = _outliers(rows, settings)
    count("outlier", outlier)
    kept = ~outlier & (rows.timestamp >= start_ms)
    return Repaired(rows.take(kept), repairs, published[kept])


def as_published(candles: CandleSeries) -> Repaired:
    """Candles to which nothing was done."""
    return Repaired(candles, Counter(), np.ones(len(candles), dtype=bool))


def _is_clean(rows: CandleSeries, settings: Settings) -> bool:
    """One cheap pass that good rows clear."""
    times = rows.timestamp
    if not len(times):
        return True
    ascending = bool((times[1:] > times[:-1]).all())
    return ascending and not (times % MINUTE_MS).any() and is_plausible(rows, settings)


def _outliers(candles: CandleSeries, settings: Settings) -> Mask:
    """Candles with a price far below the close of the minute before.

    A price that stays there is real, so only its first minute is lost; and no later price has a say in it.
    """
    wrong = np.zeros(len(candles), dtype=bool)
    if len(candles) > 1:
        least = candles.close[:-1] / settings.CC_GET_CANDLES_PRICE_ANOMALY_THRESHOLD_FACTOR
        lowest = np.min([getattr(candles, name)[1:] for name in PRICE_COLUMNS], axis=0)
        wrong[1:] = (np.diff(candles.timestamp) == MINUTE_MS) & (lowest < least)
    return wrong
